"""Other tensors in the place of parameters, for as long as a forward runs."""

from __future__ import annotations

import weakref
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
    recurrent = {
        owner: {name: owner.__dict__[name] for name in ("_flat_weights", "_flat_weight_refs")}
        for owner, _, _ in values
        if isinstance(owner, nn.RNNBase)
    }
    try:
        for owner, leaf, value in values:
            owner._parameters[leaf] = _as_trainable(value, owner._parameters[leaf])  # type: ignore[assignment]
        for owner in recurrent:
            flat = [getattr(owner, name) for name in owner._flat_weights_names]
            # Of references that are out of date torch would build both anew in each call, and keep them.
            refs = [None if tensor is None else weakref.ref(tensor) for tensor in flat]
            owner.__dict__.update(_flat_weights=flat, _flat_weight_refs=refs)
        yield
    finally:
        for parameters, leaf, parameter in before:
            parameters[leaf] = parameter
        for owner, held in recurrent.items():
            owner.__dict__.update(held)


def _as_trainable(value: torch.Tensor, parameter: nn.Parameter | None) -> torch.Tensor:
    """A value that requires a gradient where the parameter does: torch's recurrent kernels round otherwise without."""
    alike = parameter is None or torch.is_grad_enabled() or value.requires_grad == parameter.requires_grad
    return value if alike else value.detach().requires_grad_(not value.requires_grad)
