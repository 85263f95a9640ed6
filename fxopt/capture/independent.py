"""A copy of a module that shares no state with it, and no memory that is written either."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from fxopt.capture.closures import rebind_within
from fxopt.capture.copy_on_write import lazy_copy
from fxopt.capture.state import REGISTRIES, all_modules

_COMPRESSED = frozenset({torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc})
_ATOMS = frozenset({bool, int, float, str, type(None)})


def independent_copy(module: nn.Module) -> nn.Module:
    """Copy a module tree.

    Tensors are copied on write where torch can: training or editing one of the two never shows in the other,
    and memory grows only by what is written. Tensors that share memory in the original share it in the copy.
    Functions that close over parts of the original, as hooks do, close over those of the copy there. Attributes that
    can't be copied (locks, handles) are shared. Those that were computed from parameters are copied without their
    history, which leads into the original.
    """
    memo: dict[int, Any] = {}
    storages: dict[int, torch.UntypedStorage] = {}
    for tensor in (*module.parameters(), *module.buffers(), *_computed(module)):
        if is_lazy(tensor):
            continue
        memo[id(tensor)] = _copy_tensor(tensor, storages)
    for child in module.modules():
        if isinstance(child, torch.jit.ScriptModule) and id(child) not in memo:
            memo[id(child)] = _copy_script(child)
            memo |= {id(part): part for part in child.modules() if part is not child}
    return _copy_tree(module, memo)


def same_tensors_copy(module: nn.Module) -> nn.Module:
    """Copy a module tree over the very same parameters and buffers."""
    return copy_over(module, {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())})


def apart_in_memory(module: nn.Module) -> nn.Module:
    """An `independent_copy` that has memory of its own at once, for where it matters which memory is read."""
    duplicate = independent_copy(module)
    for tensor in (*duplicate.parameters(), *duplicate.buffers()):
        if tensor.layout is torch.strided and not is_lazy(tensor):
            tensor.untyped_storage().data_ptr()  # whoever asks for it may write there, so torch copies first
    return duplicate


def copy_over(module: nn.Module, tensors: dict[int, Any]) -> nn.Module:
    """Copy a module tree over other parameters and buffers: `tensors` gives them by the identity of the old ones."""
    memo = dict(tensors)
    memo |= {id(child): child for child in module.modules() if isinstance(child, torch.jit.ScriptModule)}
    return _copy_tree(module, memo)


def _copy_tree(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    modules = list(all_modules(module))
    plain = [child for child in modules if _is_plain(child)]
    for child in plain:
        memo[id(child)] = type(child).__new__(type(child))
    for child in reversed(plain):  # what is not plain may look into those within it when it is copied
        _fill(memo[id(child)], child, memo)
    result: nn.Module = copy.deepcopy(module, memo)
    for child in modules:  # torchvision's feature extractors are in training mode once they are copied
        copied = memo.get(id(child), child)
        if copied.training is not child.training:
            copied.train(child.training)
    rebind_within(module, memo)
    return result


def _computed(module: nn.Module) -> Iterator[torch.Tensor]:
    """Attributes, or parts of them, that are tensors with a history, which torch copies none of."""
    for child in all_modules(module):
        for name, value in child.__dict__.items():
            is_filled = isinstance(value, (list, tuple, dict)) and name not in REGISTRIES and bool(value)
            for leaf in pytree.tree_leaves(value) if is_filled else [value]:
                if isinstance(leaf, torch.Tensor) and not leaf.is_leaf:
                    yield leaf


def _is_plain(module: nn.Module) -> bool:
    if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        return False
    # A class that says what its state is keeps what can't be copied out of it: what `torch.compile` gives is bound to
    # the weights it was made with, and makes its forward anew.
    kind = type(module)
    return not hasattr(kind, "__deepcopy__") and kind.__getstate__ is nn.Module.__getstate__


def _copy_script(module: torch.jit.ScriptModule) -> torch.jit.ScriptModule:
    # Under autograd, the parameters of torch's own copy have a history and can't be trained.
    with torch.no_grad():
        duplicate: torch.jit.ScriptModule = copy.deepcopy(module)
    for parameter, original in zip(duplicate.parameters(), module.parameters(), strict=True):
        parameter.requires_grad_(original.requires_grad)
    return duplicate


def _fill(duplicate: nn.Module, original: nn.Module, memo: dict[int, Any]) -> None:
    for name, value in original.__dict__.items():
        if name in REGISTRIES:
            continue
        if type(value) in _ATOMS:
            duplicate.__dict__[name] = value
            continue
        if type(value) is OrderedDict and not value:  # most are: registries of hooks
            duplicate.__dict__[name] = memo.setdefault(id(value), OrderedDict())
            continue
        try:
            duplicate.__dict__[name] = copy.deepcopy(value, memo)
        except Exception:  # whatever a user's attribute raises when it is copied
            duplicate.__dict__[name] = value
    for name in REGISTRIES:
        duplicate.__dict__[name] = copy.deepcopy(original.__dict__[name], memo)


def _copy_tensor(tensor: torch.Tensor, storages: dict[int, torch.UntypedStorage]) -> torch.Tensor:
    value = tensor.detach()
    if tensor.layout in _COMPRESSED:  # `copy.deepcopy` refuses these: they have no memory of one piece
        made = value.clone().requires_grad_(tensor.requires_grad)
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    if tensor.layout is not torch.strided or tensor.is_quantized or type(value) is not torch.Tensor:
        return copy.deepcopy(tensor)
    storage = value.untyped_storage()
    key = storage._cdata
    if key not in storages:
        whole = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
        duplicate_storage = lazy_copy(whole)
        assert duplicate_storage is not None
        storages[key] = duplicate_storage.untyped_storage()
    shared = torch.empty(0, dtype=value.dtype, device=value.device)
    shared.set_(storages[key], value.storage_offset(), value.shape, value.stride())
    if not isinstance(tensor, nn.Parameter):
        return shared.requires_grad_(tensor.requires_grad and tensor.is_leaf)
    duplicate = nn.Parameter(shared, requires_grad=tensor.requires_grad)
    duplicate.__dict__.update(tensor.__dict__)
    return duplicate
