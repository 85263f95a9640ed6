"""One run of a module, or of what an engine made of it, that leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fxopt.capture.state import apart, random_state_kept, state_kept
from fxopt.inputs import Inputs


def once(run: Callable[..., Any], modules: Sequence[nn.Module], inputs: Inputs) -> tuple[list[Any], Any]:
    """All values that a run on copies of the inputs gives, and what they are nested in; see `Inputs.flatten_with`.

    Random streams and the state of `modules`, which a forward may change, are afterwards as they were.
    """
    given = inputs.map(lambda tensor: tensor.detach().clone())
    with random_state_kept(), state_kept(*modules):
        torch.manual_seed(0)
        values, structure = given.flatten_with(run(*given.args, **given.kwargs))
        return apart(values, *modules), structure
