"""The library of passes that comes with fxopt."""

from fxopt.contract import Pass
from passes.clean import Clean
from passes.fuse import Fuse
from passes.qat import QAT

__all__ = ["PASSES", "QAT", "Clean", "Fuse"]

PASSES: tuple[type[Pass], ...] = (Clean, Fuse, QAT)
