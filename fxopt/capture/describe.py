"""Nodes in words."""

from __future__ import annotations

import operator
from typing import Any

import torch.fx as fx
from torch import sym_float

from fxopt.graph.effects import OF_NUMBERS

_SYMBOLS: dict[Any, str] = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.pow: "**",
}
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
"""Functions and methods of these names."""


def describe(value: Any) -> str:
    """A node as its user would write it: `x.shape[2] // 2`."""
    if not isinstance(value, fx.Node):
        return repr(value)
    if value.op == "call_method" and value.target == "size":
        return f"{describe(value.args[0])}.shape[{value.args[1]}]"
    if (
        value.op == "call_function"
        and len(value.args) == 2
        and value.target in _SYMBOLS
        and "tensor_meta" not in value.meta
    ):
        return f"({describe(value.args[0])} {_SYMBOLS[value.target]} {describe(value.args[1])})"
    comparison = _COMPARISONS.get(str(getattr(value.target, "__name__", value.target)))
    if comparison is not None and len(value.args) == 2:
        return f"({describe(value.args[0])} {comparison} {describe(value.args[1])})"
    if value.op == "call_function" and value.target is operator.truth:
        return describe(value.args[0])
    if value.op == "call_function" and value.target in (getattr, operator.getitem):
        owner, part = value.args[0], value.args[1]
        return f"{describe(owner)}.{part}" if value.target is getattr else f"{describe(owner)}[{part!r}]"
    if value.op == "call_function" and value.target in OF_NUMBERS:
        name = "float" if value.target is sym_float else value.target.__name__  # type: ignore[union-attr]
        return f"{name}({', '.join(map(describe, value.args))})"
    if value.op == "call_method" and value.target == "item":
        return f"{describe(value.args[0])}.item()"
    if value.op in ("get_attr", "call_module"):
        return str(value.target)
    return value.name
