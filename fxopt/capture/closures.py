"""Functions in a copy of a module, as hooks are, close over the parts of the copy."""

from __future__ import annotations

import copy
import types
from collections.abc import Set
from typing import Any

import torch
from torch import nn

from fxopt.capture.state import REGISTRIES, all_modules


def rebind_within(module: nn.Module, memo: dict[int, Any]) -> None:
    """Let the functions in the copy of a module tree close over what `memo` has in the place of parts of the tree."""
    parts = [part for part in all_modules(module) if not isinstance(part, torch.jit.ScriptModule)]
    owners = [part for part in parts if id(part) in memo]
    ours = {id(value) for owner in owners for value in (owner, *owner.__dict__.values())} & memo.keys()
    for owner in owners:
        duplicate = memo[id(owner)].__dict__
        _rebind(duplicate, memo, ours)
        for name, value in duplicate.items():
            if isinstance(value, dict) and value is not owner.__dict__.get(name) and name not in REGISTRIES:
                _rebind(value, memo, ours)


def _rebind(held: dict[Any, Any], memo: dict[int, Any], ours: Set[int]) -> None:
    """Let the functions among the values of a dict close over copies of what is `ours`."""
    for name, value in held.items():
        if isinstance(value, types.FunctionType):
            held[name] = _bound_anew(value, memo, ours)


def _bound_anew(function: types.FunctionType, memo: dict[int, Any], ours: Set[int]) -> types.FunctionType:
    if id(function) in memo:
        known: types.FunctionType = memo[id(function)]
        return known
    memo[id(function)] = function  # what it closes over may close over it
    old = function.__closure__ or ()
    new = [_contents_anew(cell, memo, ours) for cell in old]
    if all(value is _contents(cell) for value, cell in zip(new, old, strict=True)):
        return function
    cells = [
        cell if value is _contents(cell) and value is not function else types.CellType(value)
        for value, cell in zip(new, old, strict=True)
    ]
    made = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    made.__kwdefaults__ = function.__kwdefaults__
    made.__dict__.update(function.__dict__)
    for cell in cells:
        if _contents(cell) is function:
            cell.cell_contents = made
    memo[id(function)] = made
    return made


def _contents_anew(cell: types.CellType, memo: dict[int, Any], ours: Set[int]) -> Any:
    held = _contents(cell)
    if isinstance(held, types.FunctionType):
        return _bound_anew(held, memo, ours)
    return copy.deepcopy(held, memo) if id(held) in ours or id(getattr(held, "__self__", None)) in ours else held


def _contents(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is not set yet
        return None
