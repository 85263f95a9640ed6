"""Plain attributes of modules at one moment: what they were, whether they changed, and how to put them back."""

from __future__ import annotations

import types
from collections import deque
from typing import Any

import torch
from torch import nn

from fxopt.capture.copy_on_write import lazy_copy
from fxopt.capture.traced import plain

_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_ATOMS = frozenset(_NUMBERS)
_OPAQUE = (torch.Tensor, nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, torch.dtype)
_DEPTH = 4


class Attribute:
    """A value that is no number and, where it is a container or a plain object, what it held.

    Args:
        value: any attribute of a module.
        memo: what has been looked at in the same walk, by identity.
        depth: how much deeper to look.
    """

    def __init__(self, value: Any, memo: dict[int, Attribute], depth: int = _DEPTH):
        self.value = value
        self.copy = lazy_copy(value) if isinstance(value, torch.Tensor) else None
        self.version = value._version if self.copy is not None else 0
        self.may_detach = self.copy is not None and value.grad_fn is None and not value._is_view()
        self.contents: Any = None
        is_opaque = isinstance(value, _OPAQUE)
        if is_opaque or depth > 0:
            memo[id(value)] = self
        if is_opaque or depth == 0:
            return
        kind, items = _contents(value)
        if kind is dict:
            self.contents = {key: look(item, memo, depth - 1) for key, item in items.items()}
        elif kind is list:
            self.contents = [look(item, memo, depth - 1) for item in items]
        elif kind is set:
            self.contents = set(items)

    def is_left(self, now: Any, seen: set[int] | None = None, by_value: bool = False) -> bool:
        """Whether the attribute is as it was: the same number, the same object with the same contents.

        A write into a tensor is no change of the attribute: graphs keep those. `by_value` asks for equal
        values instead, be it in another tensor.
        """
        if self.copy is not None and by_value:
            return _equal(self.copy, now)
        if now is not self.value and not (by_value and type(now) is type(self.value) and self.contents is not None):
            return False
        if self.contents is None:
            return True
        seen = set() if seen is None else seen
        if id(self) in seen:
            return True
        seen.add(id(self))
        _, items = _contents(now)
        if isinstance(self.contents, set):
            return bool(self.contents == set(items))
        if len(self.contents) != len(items):
            return False
        if isinstance(self.contents, dict):
            return all(
                key in items and is_left(part, items[key], seen, by_value) for key, part in self.contents.items()
            )
        return all(is_left(part, item, seen, by_value) for part, item in zip(self.contents, items, strict=True))

    def restore(self, seen: set[int] | None = None) -> Any:
        """Put the contents back, in place, and return the value."""
        seen = set() if seen is None else seen
        if (self.copy is None and not self.contents and self.is_left(self.value)) or id(self) in seen:
            return self.value
        seen.add(id(self))
        if self.copy is not None and self.value._version != self.version:
            if self.may_detach and self.value.grad_fn is not None:
                self.value.detach_()
            with torch.no_grad():
                self.value.copy_(self.copy)
        if self.contents is not None and not self.is_left(self.value):
            _refill(self.value, self._old_contents(seen))
        elif self.contents:
            self._old_contents(seen)
        return self.value

    def _old_contents(self, seen: set[int]) -> Any:
        if isinstance(self.contents, dict):
            return {key: old(part, seen) for key, part in self.contents.items()}
        if isinstance(self.contents, list):
            return [old(part, seen) for part in self.contents]
        return self.contents


def look(value: Any, memo: dict[int, Attribute], depth: int = _DEPTH) -> Any:
    """What `value` is now: a number is itself, of anything else an `Attribute`, made once a walk for each object."""
    if type(value) in _ATOMS or isinstance(value, _NUMBERS):
        return plain(value)
    known = memo.get(id(value))
    return known if known is not None and known.value is value else Attribute(value, memo, depth)


def is_left(before: Any, now: Any, seen: set[int] | None = None, by_value: bool = False) -> bool:
    """Whether what was looked at is as it was."""
    if isinstance(before, Attribute):
        return before.is_left(now, seen, by_value)
    if before is now:
        return True
    number = plain(now)
    return type(number) is type(before) and (number == before or (number != number and before != before))


def old(before: Any, seen: set[int]) -> Any:
    """What was looked at, with its contents put back."""
    return before.restore(seen) if isinstance(before, Attribute) else before


def _contents(value: Any) -> tuple[type | None, Any]:
    if isinstance(value, dict):
        return dict, value
    if isinstance(value, (list, deque)):
        return list, value
    if isinstance(value, set):
        return set, value
    if type(value) is tuple:
        return list, value
    if type(value).__module__ != "builtins" and isinstance(getattr(value, "__dict__", None), dict):
        return dict, vars(value)
    return None, None


def _refill(value: Any, contents: Any) -> None:
    if isinstance(value, tuple):
        return
    target = value if isinstance(value, (dict, list, deque, set)) else vars(value)
    target.clear()
    if isinstance(target, (dict, set)):
        target.update(contents)
    else:
        target.extend(contents)


def _equal(before: torch.Tensor, now: Any) -> bool:
    if not isinstance(now, torch.Tensor) or now.shape != before.shape or now.dtype != before.dtype:
        return False
    with torch.no_grad():
        return bool(torch.allclose(now.detach(), before, rtol=0, atol=0, equal_nan=True))
