"""Other tensors in the place of parameters, for as long as a forward runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def replaced(values: Sequence[tuple[nn.Module, str, torch.Tensor]]) -> Iterator[None]:
    """Let modules find other tensors under the names of their parameters.

    Args:
        values: the module that owns a parameter, the name that it has there, and what stands there meanwhile.
    """
    before = [(owner._parameters, leaf, owner._parameters[leaf]) for owner, leaf, _ in values]
    recurrent = {owner: owner._flat_weights for owner, _, _ in values if isinstance(owner, nn.RNNBase)}
    try:
        for owner, leaf, value in values:
            owner._parameters[leaf] = value  # type: ignore[assignment]
        for owner in recurrent:
            owner.__dict__["_flat_weights"] = [getattr(owner, name) for name in owner._flat_weights_names]
        yield
    finally:
        for parameters, leaf, parameter in before:
            parameters[leaf] = parameter
        for owner, flat in recurrent.items():
            owner.__dict__["_flat_weights"] = flat
