"""Capture any PyTorch module as a graph, rewrite it by verified passes, measure what that gained."""

from fxopt.artifact import load, save
from fxopt.bench import Comparison, compare
from fxopt.capture import Captured, capture
from fxopt.engines import Executable, lower
from fxopt.inputs import Inputs
from fxopt.optimize import Result, optimize
from fxopt.version import __version__

__all__ = [
    "Captured",
    "Comparison",
    "Executable",
    "Inputs",
    "Result",
    "__version__",
    "capture",
    "compare",
    "load",
    "lower",
    "optimize",
    "save",
]
