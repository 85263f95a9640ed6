"""A result on disk: weights, the recipe that made it, its reports, and the code of its graphs to read."""

from fxopt.artifact.directory import check
from fxopt.artifact.load import load
from fxopt.artifact.save import Result, save

__all__ = ["Result", "check", "load", "save"]
