"""What capture made of a module, to read: the graph by module, what is opaque and why, what was assumed."""

from fxopt.explain.explanation import Explanation, explain
from fxopt.explain.render import FORMS, render

__all__ = ["FORMS", "Explanation", "explain", "render"]
