"""What the user's `evaluate` gives for a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from fxopt.capture.state import modes_kept
from fxopt.errors import FxoptError, LoadError

Evaluate = Callable[[nn.Module], Mapping[str, float]]


def evaluated(evaluate: Evaluate, module: nn.Module) -> dict[str, float]:
    """Call it without gradients, and leave the module in the mode that it was in.

    Raises:
        LoadError: where it raises, or gives something else.
    """
    try:
        with modes_kept(module), torch.no_grad():
            return {str(name): float(value) for name, value in evaluate(module).items()}
    except FxoptError:
        raise
    except Exception as error:
        raise LoadError(
            f"evaluate(module) raises {type(error).__name__}: {error}; it takes a module and returns a dict of floats"
        ) from error
