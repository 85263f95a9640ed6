"""The state of a module, so that recording leaves it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class State:
    """Buffers, parameters and plain attributes of a module tree at one moment."""

    def __init__(self, module: nn.Module):
        self._attributes = [(child, _attributes(child)) for child in module.modules()]
        self._buffers = [(child, dict(child._buffers)) for child in module.modules()]
        tensors = [*module.parameters(), *module.buffers()]
        self._tensors = [(tensor, tensor._version, _clone(tensor)) for tensor in tensors]

    def changed_numbers(self) -> list[tuple[nn.Module, str]]:
        """Plain attributes that hold another number, text or flag than before: counters, mostly."""
        changed = []
        for module, before in self._attributes:
            for name, value in module.__dict__.items():
                if isinstance(value, (int, float, str)) and name in before and before[name] != value:
                    changed.append((module, name))
        return changed

    def restore(self) -> None:
        """Put everything back, in place."""
        for module, buffers in self._buffers:
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for tensor, version, clone in self._tensors:
                # Batch norm writes its running statistics without counting it as a version.
                written = tensor._version != version or not isinstance(tensor, nn.Parameter)
                if written and not torch.equal(tensor, clone):
                    tensor.copy_(clone)
        for module, before in self._attributes:
            for name in [name for name in module.__dict__ if name not in before and not name.startswith("_")]:
                del module.__dict__[name]
            module.__dict__.update(before)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave torch's random streams as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield


def _attributes(module: nn.Module) -> dict[str, Any]:
    registries = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
    return {name: value for name, value in module.__dict__.items() if name not in registries}


def _clone(tensor: torch.Tensor) -> torch.Tensor:
    try:
        return torch._lazy_clone(tensor.detach())
    except (RuntimeError, NotImplementedError):
        return tensor.detach().clone()
