"""How large a module is, and how much one forward of it computes and holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxopt.bench.arm import Arm
from fxopt.bench.device import measurable
from fxopt.bench.memory import peak_memory
from fxopt.bench.operators import operators_of
from fxopt.bench.surroundings import quiet, visible_operators
from fxopt.inputs import Inputs


@dataclass(frozen=True)
class Size:
    """Size of a module, and cost of one forward.

    Attributes:
        parameters: elements, each parameter counted once however often it is used.
        buffers: elements of the buffers, likewise.
        bytes: of the memory behind parameters and buffers, shared memory counted once.
        flops: floating-point operations of one forward in matrix products, convolutions and attention; a
            multiply and its add are two. As torch.utils.flop_counter counts them: elementwise work is left out.
            None where it can't be counted, since a custom operator refuses to be watched.
        peak_memory: bytes that one forward holds at its peak beyond weights and inputs, see
            `fxopt.bench.memory.peak_memory`; None likewise.
    """

    parameters: int
    buffers: int
    bytes: int
    flops: int | None
    peak_memory: int | None


def measure_size(module: nn.Module, inputs: Any, device: torch.device | str = "cpu") -> Size:
    """Measure one module, on a copy of it.

    Args:
        module: in the mode that is to be measured.
        inputs: a tensor, a tuple of positional arguments, a dict of keyword ones, or `Inputs`.
        device: where the forward runs.

    Raises:
        EngineError: where the device is not there, or the module raises.
    """
    place = measurable(device)
    with quiet(place):
        arm = Arm("module", module, Inputs.of(inputs), place, timed=False)
        arm.keep_inputs(Inputs.of(inputs))
        arm.under(lambda call: call())  # A module that raises does so here, not while it is watched.
        flops = arm.watched(_flops)
        peak = arm.watched(lambda call: peak_memory(call, place))
    # Lazy parameters have no size before a first call, which the copy has seen.
    lazy = isinstance(arm.module, nn.Module) and any(map(is_lazy, (*module.parameters(), *module.buffers())))
    sized = cast(nn.Module, arm.module) if lazy else module
    return Size(
        parameters=sum(parameter.numel() for parameter in sized.parameters()),
        buffers=sum(buffer.numel() for buffer in sized.buffers()),
        bytes=state_bytes(sized),
        flops=flops,
        peak_memory=peak,
    )


def state_bytes(module: nn.Module) -> int:
    """Bytes of the memory behind parameters and buffers, shared memory counted once."""
    storages: dict[int, int] = {}
    used: dict[int, int] = {}
    seen: set[tuple[int, int, torch.Size]] = set()
    for tensor in [*module.parameters(), *module.buffers()]:
        for part in _dense_parts(tensor):
            storage = part.untyped_storage()
            key = (storage._cdata, int(part.storage_offset()), part.shape)
            if key not in seen:
                seen.add(key)
                storages[storage._cdata] = storage.nbytes()
                used[storage._cdata] = used.get(storage._cdata, 0) + part.numel() * part.element_size()
    # A slice of a large storage counts as the slice, two views of the same memory as that memory.
    return sum(min(whole, used[key]) for key, whole in storages.items())


def _dense_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors that a sparse tensor or a tensor subclass is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _dense_parts(getattr(tensor, name))]
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.detach()]


def _flops(call: Callable[[], object]) -> int:
    with visible_operators():
        return sum(one.flops or 0 for one in operators_of(call))
