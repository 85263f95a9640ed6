"""The library of passes that comes with fxopt."""

from fxopt.contract import Pass
from passes.fuse import Fuse
from passes.qat import QAT

__all__ = ["PASSES", "QAT", "Fuse"]

PASSES: tuple[type[Pass], ...] = (Fuse, QAT)
