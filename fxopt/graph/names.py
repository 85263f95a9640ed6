"""Calls by the name of what they compute, however they are spelled."""

from __future__ import annotations

from typing import Any

import torch.fx as fx

_OTHER_NAMES = {
    "iadd": "add",
    "isub": "sub",
    "subtract": "sub",
    "imul": "mul",
    "multiply": "mul",
    "itruediv": "div",
    "truediv": "div",
    "true_divide": "div",
    "divide": "div",
    "ipow": "pow",
    "negative": "neg",
    "float_power": "pow",
    "bmm": "matmul",
    "imatmul": "matmul",
}
_OURS = {"torch", "_operator", "operator", "math", "builtins"}
_MOVE_AXES = {"transpose_", "swapaxes_", "swapdims_", "t_", "squeeze_", "unsqueeze_"}
"""What changes the axes of the very value that it is given, which is no longer what it was before the call."""


def name_of(node: Any) -> str:
    """`add`, `mul`, `matmul`, ... for a function, a method or an operator, in place or not; "" for anything else.

    What moves axes in place keeps its own name: `transpose_`.
    """
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method") or "out" in node.kwargs:
        return ""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if not isinstance(node.target, str):
        home = getattr(node.target, "__module__", None) or "torch"
        if home.partition(".")[0] not in _OURS:
            return ""
    name = name if name.startswith("_") or name in _MOVE_AXES else name.rstrip("_")
    return _OTHER_NAMES.get(name, name)


def operands(node: fx.Node) -> tuple[Any, Any] | None:
    """Both sides of a binary call; None where it is told more than that."""
    given = (*node.args, *node.kwargs.values())
    plain = not node.kwargs.keys() - {"input", "other", "mat2", "exponent"}
    return (given[0], given[1]) if len(given) == 2 and plain else None
