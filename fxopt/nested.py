"""Values nested in lists, dicts and objects, such as the cache of a language model: taken apart, and copied."""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree


def attributes_of(value: Any) -> dict[str, Any] | None:
    """The attributes of an object that can be built again from them, else None."""
    if isinstance(value, (nn.Module, torch.Tensor, type, enum.Enum)) or callable(value):
        return None
    if isinstance(value, dict) and dataclasses.is_dataclass(value):
        # The fields of a model output are its items and its attributes at once.
        return dict(vars(value))
    state = getattr(value, "__dict__", None)
    if state is None:
        return None if not isinstance(value, (dict, list, tuple)) else {}
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    return None if [name for name in slots if name not in ("__dict__", "__weakref__")] else dict(state)


def items_of(value: Any) -> Any:
    """The items of a subclass of dict, list or tuple, else None."""
    if isinstance(value, dict):
        return dict(dict.items(value))
    if isinstance(value, (list, tuple)):
        return list(value)
    return None


def is_object(leaf: Any) -> bool:
    """Whether what pytree takes for a leaf is made of others."""
    return not isinstance(leaf, torch.Size) and (bool(attributes_of(leaf)) or items_of(leaf) is not None)


def is_shape(value: Any) -> bool:
    """Whether it is a `torch.Size`, of which pytree makes a tuple unless it is told that it is a leaf."""
    return isinstance(value, torch.Size)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in order, those within objects too."""
    for leaf in pytree.tree_leaves(value):
        yield from _tensors(leaf, set())


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    items = items_of(value)
    for item in items.values() if isinstance(items, dict) else items or ():
        yield from _tensors(item, seen)
    if items is None or not isinstance(value, dict):
        for item in (attributes_of(value) or {}).values():
            yield from _tensors(item, seen)


def is_same(one: Any, other: Any) -> bool:
    """Whether two plain values are of one type and equal: NaN to NaN, and an array to another in all it holds."""
    if one is other or type(one) is not type(other):
        return one is other
    if isinstance(one, np.ndarray):
        return bool(one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes())
    return bool(one == other) or bool(one != one and other != other)


def flatten(value: Any) -> tuple[list[Any], Any]:
    """All tensors and plain values in order, and what they were nested in, to be compared with that of another."""
    return _flatten(value, frozenset())


def _flatten(value: Any, within: frozenset[int]) -> tuple[list[Any], Any]:
    leaves, structure = pytree.tree_flatten(value)
    found: list[Any] = []
    objects: list[Any] = []
    for leaf in leaves:
        if id(leaf) in within or not is_object(leaf):
            found.append(leaf)
            continue
        parts, below = _flatten([attributes_of(leaf), items_of(leaf)], within | {id(leaf)})
        objects.append((len(found), type(leaf), below))
        found += parts
    return found, (structure, objects) if objects else structure


def with_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same with each tensor changed; lists, dicts and objects are copied, unless they can't be.

    Tensors are changed in the order of `tensors_in`, each as often as it is there.
    """
    memo: dict[int, Any] = {}

    def changed(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return change(leaf)
        if not is_object(leaf):
            return leaf
        memo.update((id(tensor), change(tensor)) for tensor in tensors_in(leaf))
        try:
            return copy.deepcopy(leaf, memo)
        except Exception:  # locks and handles
            return leaf

    return pytree.tree_map(changed, value, is_leaf=is_shape)
