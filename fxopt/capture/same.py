"""Whether two results are the same: their structure, their types, and their values to the bit."""

from __future__ import annotations

from typing import Any

import torch

from fxopt.nested import attributes_of, items_of


def difference(expected: Any, actual: Any, name: str = "the output", seen: set[int] | None = None) -> str | None:
    """Where and how `actual` differs from `expected`, in words; None where it doesn't."""
    seen = set() if seen is None else seen
    if isinstance(expected, torch.Tensor):
        return _tensors(expected, actual, name)
    if type(expected) is not type(actual):
        return f"{name} is a {type(actual).__name__}, not a {type(expected).__name__}"
    if id(expected) in seen:
        return None
    seen.add(id(expected))
    items, others = items_of(expected), items_of(actual)
    if items is not None:
        if len(items) != len(others):
            return f"{name} has {len(others)} items, not {len(items)}"
        if isinstance(items, dict) and list(items) != list(others):
            return f"{name} has other keys"
        for key in items if isinstance(items, dict) else range(len(items)):
            found = difference(items[key], others[key], f"{name}[{key!r}]", seen)
            if found:
                return found
    attributes, other_attributes = attributes_of(expected), attributes_of(actual)
    if attributes:
        for key, value in attributes.items():
            found = difference(value, (other_attributes or {}).get(key), f"{name}.{key}", seen)
            if found:
                return found
    if isinstance(expected, (bool, int, float, complex, str, bytes)) and expected != actual and expected == expected:
        return f"{name} is {actual!r}, not {expected!r}"
    return None


def _tensors(expected: torch.Tensor, actual: Any, name: str) -> str | None:
    if not isinstance(actual, torch.Tensor):
        return f"{name} is a {type(actual).__name__}, not a tensor"
    if actual.layout is not expected.layout or actual.dtype is not expected.dtype:
        return f"{name} is {actual.dtype} ({actual.layout}), not {expected.dtype} ({expected.layout})"
    if actual.requires_grad is not expected.requires_grad:
        return f"{name} {'requires' if actual.requires_grad else 'does not require'} a gradient, unlike the original's"
    if expected.is_nested or actual.is_nested:
        if not (expected.is_nested and actual.is_nested):
            return f"{name} is {'' if actual.is_nested else 'not '}nested"
        return difference(list(expected.unbind()), list(actual.unbind()), name)
    if actual.shape != expected.shape:
        return f"{name} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    with torch.no_grad():
        left, right = _dense(expected), _dense(actual)
        if torch.equal(left, right) or bool(((left == right) | ((left != left) & (right != right))).all()):
            return None
        worst = (left.to(torch.complex128) - right.to(torch.complex128)).abs().nan_to_num(float("inf")).max().item()
    return f"{name} differs by up to {worst:.2g}"


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    value = tensor.detach()
    if value.is_quantized:
        return value.int_repr()
    return value.to_dense() if value.layout is not torch.strided else value
