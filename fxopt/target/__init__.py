"""`model.py`, `model.py:Name`, `package.module:factory` -> Target: a module, its inputs, what else its file says."""

from fxopt.target.load import Target, load
from fxopt.target.weights import load_weights, read_tensors

__all__ = ["Target", "load", "load_weights", "read_tensors"]
