"""The state of a module, so that recording leaves it as it was and knows what a forward changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
import torch.fx as fx
from torch import nn
from torch.nn.parameter import is_lazy

from fxopt.capture.attributes import Attribute, is_left, look, old
from fxopt.capture.chance import random_state_kept
from fxopt.capture.copy_on_write import lazy_copy, version_of

__all__ = [
    "REGISTRIES",
    "State",
    "all_modules",
    "apart",
    "memory_of",
    "modes_kept",
    "origins",
    "random_state_kept",
    "state_kept",
    "tensors_kept",
    "with_versions",
]

REGISTRIES = ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set")
_HOOKS = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, dict)) - {*REGISTRIES}
"""Registries of hooks: most of a module's attributes, and hardly ever with anything in them."""


class State:
    """Buffers, parameters, submodules and plain attributes of a module tree at one moment; whether autograd records."""

    def __init__(self, module: nn.Module):
        self._gradients = torch.is_grad_enabled()
        self._seen: dict[int, Attribute] = {}
        self._modules = [child for child in all_modules(module) if not isinstance(child, torch.jit.ScriptModule)]
        self._attributes = [
            {name: look(value, self._seen) for name, value in _attributes(child).items()} for child in self._modules
        ]
        self._registries = [
            {name: child.__dict__[name].copy() for name in REGISTRIES if name in child.__dict__}
            for child in self._modules
        ]
        tensors = [*module.parameters(), *module.buffers()]
        self._tensors = [(tensor, version_of(tensor), lazy_copy(tensor)) for tensor in tensors if not is_lazy(tensor)]
        self._leaves = [tensor for tensor, _, _ in self._tensors if tensor.grad_fn is None]

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether an attribute is `tensor`, or holds it."""
        known = self._seen.get(id(tensor))
        return known is not None and known.value is tensor

    def changed(self, *, by_value: bool = False) -> list[tuple[nn.Module, str]]:
        """Attributes that were set, deleted or filled since: (module, name).

        `by_value` takes a tensor with equal values for the same one.
        """
        changed = []
        for module, before in zip(self._modules, self._attributes, strict=True):
            now = _attributes(module)
            for name in {**before, **now}:
                if name == "training":
                    continue
                if name not in before or name not in now or not is_left(before[name], now[name], None, by_value):
                    changed.append((module, name))
        return changed

    def changed_tree(self) -> list[tuple[nn.Module, str]]:
        """Parameters and submodules that were registered or replaced since: (module, name)."""
        changed = []
        for module, before in zip(self._modules, self._registries, strict=True):
            for registry in ("_parameters", "_modules"):
                old, now = before[registry], module.__dict__[registry]
                changed += [(module, name) for name in {**old, **now} if old.get(name) is not now.get(name)]
        return changed

    def written(self) -> set[int]:
        """Positions of the parameters and buffers whose values are others than before."""
        return {
            index for index, (tensor, version, copy) in enumerate(self._tensors) if _is_written(tensor, version, copy)
        }

    def restore(self) -> None:
        """Put everything back, in place."""
        torch.set_grad_enabled(self._gradients)
        self.restore_tensors()
        for module, registries in zip(self._modules, self._registries, strict=True):
            for name, before in registries.items():
                registry = module.__dict__[name]
                if isinstance(before, set) or _is_other(before, registry):
                    registry.clear()
                    registry.update(before)
        self.restore_attributes()

    def restore_attributes(self) -> None:
        """Put plain attributes back, and which hooks there are."""
        seen: set[int] = set()
        for module, attributes in zip(self._modules, self._attributes, strict=True):
            graph = module.__dict__.get("_graph")
            for name in [name for name in _attributes(module) if name not in attributes]:
                if name in _HOOKS:
                    module.__dict__[name].clear()
                else:
                    del module.__dict__[name]
            for name, before in attributes.items():
                module.__dict__[name] = old(before, seen)
            if isinstance(module, fx.GraphModule) and module.graph is not graph:
                module.recompile()  # its class has the code of the graph of the other mode

    def restore_tensors(self) -> None:
        """Put the values of parameters and buffers back, and which tensor is registered as what."""
        for module, registries in zip(self._modules, self._registries, strict=True):
            module._buffers.update(registries["_buffers"])
        for tensor in self._leaves:
            if tensor.grad_fn is not None:
                tensor.detach_()
        with torch.no_grad():
            for tensor, version, copy in self._tensors:
                if copy is None or not _is_written(tensor, version, copy):
                    continue
                if tensor.shape == copy.shape:
                    tensor.copy_(copy)
                else:
                    tensor.set_(copy.clone())  # type: ignore[call-overload]  # torch declares it for storages only


@contextmanager
def tensors_kept(*modules: nn.Module) -> Iterator[None]:
    """Leave the values of parameters and buffers as they were."""
    with ExitStack() as held:
        for module in modules:
            held.callback(State(module).restore_tensors)
        yield


@contextmanager
def state_kept(*modules: nn.Module) -> Iterator[None]:
    """Leave parameters, buffers and plain attributes as they were."""
    with ExitStack() as held:
        for module in modules:
            held.callback(State(module).restore)
        yield


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Leave a module and those in it in training or evaluation, as each of them was."""
    modes = [(child, child.training) for child in module.modules()]
    try:
        yield
    finally:
        for child, training in modes:
            if child.training is not training:
                child.train(training)  # a captured module takes the graph of that mode


@contextmanager
def with_versions() -> Iterator[None]:
    """Count writes into the tensors that are made within, which torch does not in its inference mode."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def apart(values: Iterable[Any], *modules: nn.Module) -> list[Any]:
    """What a run gave, without history, and copied where it is the modules' own state, which is then set back.

    What NumPy holds is given as tensors, to be compared as these are.
    """
    held = memory_of(*(tensor for module in modules for tensor in (*module.parameters(), *module.buffers())))

    def one(value: Any) -> Any:
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
            return torch.from_numpy(np.array(value))
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach() if held.isdisjoint(memory_of(value)) else value.detach().clone()

    return [one(value) for value in values]


def memory_of(*tensors: torch.Tensor) -> set[int]:
    """Where tensors lie, to tell which share memory; those of sparse and other layouts are left out."""
    return {tensor.untyped_storage()._cdata for tensor in tensors if tensor.layout is torch.strided}


def all_modules(module: nn.Module) -> Iterator[nn.Module]:
    """All modules of a tree, and the originals whose Python code captured ones run."""
    for child in module.modules():
        yield from origins(child)


def origins(module: nn.Module) -> Iterator[nn.Module]:
    """A module, the original whose Python code it runs where it is a captured one, the original of that, and so on."""
    part: Any = module
    while isinstance(part, nn.Module):
        yield part
        part = part.__dict__.get("_origin")


def _is_written(tensor: torch.Tensor, version: int, copy: torch.Tensor | None) -> bool:
    # Writes through `.data`, and those of batch norm into its statistics, don't count as a version.
    if copy is None or (version_of(tensor) == version and _is_untouched(tensor)):
        return False
    try:
        return not torch.equal(tensor, copy)
    except (RuntimeError, NotImplementedError):  # fake, sparse and quantized tensors can't always be compared
        return version_of(tensor) != version


def _is_untouched(tensor: torch.Tensor) -> bool:
    """Whether a tensor still shares memory with the copy that was made of it."""
    try:
        return bool(torch._C._is_cow_tensor(tensor))  # type: ignore[attr-defined]
    except (RuntimeError, NotImplementedError):
        return False


def _is_other(before: dict[str, Any], now: dict[str, Any]) -> bool:
    return list(before) != list(now) or any(now[name] is not value for name, value in before.items())


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes by name, without what is registered and without empty registries of hooks."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if name not in REGISTRIES and (name not in _HOOKS or value)
    }
