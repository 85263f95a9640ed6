"""What calls are given and give: arguments, shapes and dtypes."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from fxopt.graph import Effects, Region, name_of


def given(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def shape_of(node: Any) -> tuple[int, ...] | None:
    """The shape that a value had on the example; None for what is no tensor."""
    meta = node.meta.get("tensor_meta") if isinstance(node, fx.Node) else None
    return None if meta is None else tuple(meta.shape)


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype of a value; None for what is no tensor."""
    dtype: torch.dtype | None = getattr(node.meta.get("tensor_meta"), "dtype", None)
    return dtype


def is_one_real_dtype(*nodes: fx.Node) -> bool:
    """Whether values are of one dtype that torch's operators take and differentiate by: complex ones are not."""
    first, *rest = map(dtype_of, nodes)
    return first is not None and first.is_floating_point and all(dtype is first for dtype in rest)


def is_number(value: Any) -> bool:
    """Whether a value is a plain number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_of_sizes(value: Any) -> bool:
    """Whether a value is a number that sizes make, such as the root of one; none of these is below zero."""
    if is_number(value):
        return bool(value > 0)
    name = name_of(value)
    args: tuple[Any, ...] = getattr(value, "args", ())
    if name in ("size", "pow"):
        return len(args) == 2 and is_number(args[1]) and (name == "size" or is_of_sizes(args[0]))
    return name in ("sqrt", "mul", "div", "floordiv", "sym_float") and bool(args) and all(map(is_of_sizes, args))


def is_cast(node: fx.Node) -> bool:
    """Whether a call returns its first argument in the dtype that it has, or another, and does nothing else."""
    return name_of(node) in ("to", "float", "type_as", "type", "double", "half", "bfloat16") and bool(
        node.args and isinstance(node.args[0], fx.Node) and shape_of(node) is not None
    )


def without_casts(node: Any) -> Any:
    """What a value was before casts that change nothing."""
    while isinstance(node, fx.Node) and is_cast(node) and dtype_of(node) == dtype_of(node.args[0]):  # type: ignore[arg-type]
        node = node.args[0]
    return node


def is_last(axis: Any, node: fx.Node) -> bool:
    """Whether `axis`, a number or a list of one, is the last one of a value."""
    if isinstance(axis, (tuple, list)) and len(axis) == 1:
        axis = axis[0]
    shape = shape_of(node)
    return axis == -1 or (shape is not None and is_number(axis) and axis == len(shape) - 1)


def why_written(value: fx.Node, start: fx.Node, end: fx.Node, region: Region) -> str | None:
    """Why `value` can't be read at `end` as it was read at `start`, or `end` be left out; None if both can."""
    effects = Effects(region)
    if effects.writes(end):
        return "it is computed in place, in memory that something else may read"
    writer = effects.written_between(value, start, end)
    return None if writer is None else f"'{region.qualified(writer)}' writes into '{region.qualified(value)}' meanwhile"
