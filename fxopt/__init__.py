"""Capture any PyTorch module as a graph, rewrite it by verified passes, measure what that gained."""

from fxopt.version import __version__

__all__ = ["__version__"]
