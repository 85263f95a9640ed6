"""The library of passes that comes with fxopt."""

from fxopt.contract import Pass
from passes.fuse import Fuse

__all__ = ["PASSES", "Fuse"]

PASSES: tuple[type[Pass], ...] = (Fuse,)
