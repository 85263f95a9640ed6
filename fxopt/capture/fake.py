"""Capture without values: on tensors that have shapes and dtypes but no memory, for models too large to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils import _pytree as pytree

from fxopt.capture.call import Call
from fxopt.capture.copy_on_write import lazy_copy
from fxopt.capture.independent import copy_over

NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)
"""What is raised where code asks a fake tensor for its values."""


@dataclass(frozen=True)
class Fake:
    """A module and a call of it without values.

    Attributes:
        mode: within which to run it.
        module: a copy whose parameters and buffers are fake.
        call: the call with fake tensors.
    """

    mode: FakeTensorMode
    module: nn.Module
    call: Call
    _real: Mapping[int, Callable[[], torch.Tensor]]

    def give_back_tensors(self, module: nn.Module) -> None:
        """Put real tensors (those of a module on the meta device: meta tensors) in the place of fake ones."""
        made: dict[int, torch.Tensor] = {}
        for child in module.modules():
            for registry in (child._parameters, child._buffers):
                for name, tensor in registry.items():
                    if isinstance(tensor, FakeTensor):
                        if id(tensor) not in made:
                            real = self._real.get(id(tensor))
                            made[id(tensor)] = real() if real is not None else _meta(tensor)
                        registry[name] = made[id(tensor)]  # type: ignore[assignment]


def without_values(module: nn.Module, call: Call) -> Fake:
    """A copy of `module` that takes no memory for its weights, and the call for it.

    A module on the meta device, or one built under a FakeTensorMode, is taken to live where its inputs are.
    """
    tensors = [*module.parameters(), *module.buffers()]
    leaves = [leaf for leaf in pytree.tree_leaves((call.args, dict(call.kwargs))) if isinstance(leaf, torch.Tensor)]
    mode = next((t.fake_mode for t in (*tensors, *leaves) if isinstance(t, FakeTensor)), None)
    mode = mode or FakeTensorMode(allow_non_fake_inputs=True)
    device = next((leaf.device for leaf in leaves if leaf.device.type != "meta"), torch.device("cpu"))
    memo: dict[int, Any] = {}
    real: dict[int, Callable[[], torch.Tensor]] = {}
    for tensor in tensors:
        if id(tensor) not in memo:
            fake = memo[id(tensor)] = _fake(tensor, mode, device)
            real[id(fake)] = lambda tensor=tensor: _independent(tensor)  # type: ignore[misc]

    def replace(tensor: torch.Tensor) -> torch.Tensor:
        return _fake(tensor, mode, device)

    args, kwargs = pytree.tree_map_only(torch.Tensor, replace, (call.args, dict(call.kwargs)))
    return Fake(mode, copy_over(module, memo), Call(args, kwargs), real)


def _fake(tensor: torch.Tensor, mode: FakeTensorMode, device: torch.device) -> torch.Tensor:
    # A deep copy of a fake tensor is of a mode of its own.
    if isinstance(tensor, FakeTensor) and tensor.fake_mode is mode and tensor.device.type != "meta":
        return tensor
    with mode:
        place = device if tensor.device.type == "meta" else tensor.device
        fake = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=place)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake.requires_grad_(tensor.requires_grad)


def _independent(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, FakeTensor):
        return _meta(tensor)
    value = lazy_copy(tensor)
    assert value is not None
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value


def _meta(tensor: torch.Tensor) -> torch.Tensor:
    value = torch.empty_strided(tuple(tensor.size()), tensor.stride(), dtype=tensor.dtype, device="meta")
    return nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value
