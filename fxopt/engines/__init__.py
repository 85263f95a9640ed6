"""Engines: a captured module goes in, something faster to call comes out."""

from fxopt.engines.candidates import Rung
from fxopt.engines.contract import Built, Engine, Sizes
from fxopt.engines.executable import Executable
from fxopt.engines.ladder import Ladder, climb
from fxopt.engines.lower import lower
from fxopt.engines.table import ENGINES

__all__ = ["ENGINES", "Built", "Engine", "Executable", "Ladder", "Rung", "Sizes", "climb", "lower"]
