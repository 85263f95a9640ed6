"""Reads what a softmax is applied to: products of queries and keys, scaled and masked in any order.

softmax( mask( scale (q k^T) + bias ) )
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.fx as fx

from fxopt.graph import Region, name_of, operands
from passes.attention.call import dtype_of, given, is_cast, is_number, shape_of, without_casts

LOST = 16.0
"""A fill this many times the rounding error of its size swallows any score that is added to it."""


@dataclass(frozen=True)
class Mask:
    """What keeps queries from keys.

    Attributes:
        kind: `add` for what is added to the scores; `keep` and `drop` for booleans, true where a key takes part or
            does not.
        node: the values.
        fill: what dropped scores become.
        split: the sizes of the scores with the first axis split in two, where that is how the mask is added.
    """

    kind: Literal["add", "keep", "drop"]
    node: fx.Node
    fill: float = -math.inf
    split: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Scores:
    """q k^T with what is done to it before the softmax.

    Attributes:
        product: the matrix product.
        query: its left operand.
        keys: its right operand, (…, width, keys).
        scale: the plain numbers that it is multiplied with.
        factors: what else it is multiplied with, or divided by (-1).
        masks: in the order in which they are applied.
        chain: the calls from the product to the last mask.
    """

    product: fx.Node
    query: fx.Node
    keys: fx.Node
    scale: float = 1.0
    factors: tuple[tuple[fx.Node, int], ...] = ()
    masks: tuple[Mask, ...] = ()
    chain: tuple[fx.Node, ...] = ()


def read_scores(node: Any, region: Region) -> Scores | str | None:
    """The scores that `node` is; None where it is no such thing, else why they can't be computed otherwise."""
    name = name_of(node)
    if name == "matmul":
        both = operands(node)
        if both is None or not all(isinstance(item, fx.Node) for item in both):
            return None
        return Scores(node, both[0], both[1], chain=(node,))
    if is_cast(node) if isinstance(node, fx.Node) else False:
        return _then(read_scores(node.args[0], region), node)
    reader = {"mul": _scaled, "div": _scaled, "add": _biased, "masked_fill": _filled, "where": _filled,
              "view": _regrouped, "reshape": _regrouped}.get(name)  # fmt: skip
    return None if reader is None else reader(node, region)


def _then(inner: Scores | str | None, node: fx.Node, **changes: Any) -> Scores | str | None:
    return replace(inner, chain=(*inner.chain, node), **changes) if isinstance(inner, Scores) else inner


def _scaled(node: fx.Node, region: Region) -> Scores | str | None:
    both = operands(node)
    if both is None:
        return None
    divides = name_of(node) == "div"
    inner, by = read_scores(both[0], region), both[1]
    if inner is None and not divides:
        inner, by = read_scores(both[1], region), both[0]
    if not isinstance(inner, Scores):
        return inner
    if any(mask.kind == "add" or math.isfinite(mask.fill) for mask in inner.masks):
        return "the scores are scaled after they are masked"
    if is_number(by):
        return _then(inner, node, scale=inner.scale / by if divides else inner.scale * by)
    shape = shape_of(by)
    if shape is not None and any(size != 1 for size in shape[-2:]):
        return f"its scale has the shape {shape}: it is not one for all queries and keys"
    if shape and dtype_of(by) != dtype_of(inner.query):
        return f"its scale is {dtype_of(by)}, the queries are {dtype_of(inner.query)}"
    return _then(inner, node, factors=(*inner.factors, (by, -1 if divides else 1)))


def _biased(node: fx.Node, region: Region) -> Scores | str | None:
    both = operands(node)
    for scores, bias in (both, both[::-1]) if both is not None else ():
        inner = read_scores(scores, region)
        if inner is None or shape_of(without_casts(scores)) != shape_of(node):
            continue
        if isinstance(inner, Scores) and not isinstance(bias, fx.Node):
            return None
        return _then(inner, node, masks=(*inner.masks, Mask("add", bias)) if isinstance(inner, Scores) else ())
    return None


def _regrouped(node: fx.Node, region: Region) -> Scores | str | None:
    """A bias that is added with the first axis split in two, as windows of an image are."""
    total = node.args[0]
    both = operands(total) if isinstance(total, fx.Node) and name_of(total) == "add" else None
    if (
        not isinstance(total, fx.Node)
        or both is None
        or name_of(both[0]) not in ("view", "reshape")
        or not isinstance(both[1], fx.Node)
    ):
        return None
    split, bias = both
    sizes = split.args[1] if isinstance(split.args[1], (tuple, list)) else split.args[1:]
    shape, wide = shape_of(node), shape_of(split)
    inner = read_scores(split.args[0], region)
    if not isinstance(inner, Scores):
        return inner
    if shape is None or wide is None or shape_of(total) != wide:
        return None
    if shape_of(inner.product) != shape or wide[2:] != shape[1:] or wide[0] * wide[1] != shape[0]:
        return None
    mask = Mask("add", bias, split=tuple(sizes))
    return replace(inner, masks=(*inner.masks, mask), chain=(*inner.chain, split, total, node))


def _filled(node: fx.Node, region: Region) -> Scores | str | None:
    keeps = name_of(node) == "where"
    names = ("condition", "input", "other") if keeps else ("input", "mask", "value")
    asked = given(node, *names)
    inner = read_scores(asked.get("input"), region)
    if not isinstance(inner, Scores):
        return inner
    condition, fill = (asked.get(name) for name in (("condition", "other") if keeps else ("mask", "value")))
    value, dtype = _number(fill, region), dtype_of(node)
    if value is None or dtype is None or not isinstance(condition, fx.Node) or dtype_of(condition) is not torch.bool:
        return "what it fills masked scores with is computed"
    if math.isfinite(value):  # as wide a number as the queries hold is added to scores, in float32 or wider
        value = max(value, torch.finfo(dtype_of(inner.query) or dtype).min)
    if value > -LOST / min(torch.finfo(kind).eps for kind in (dtype, torch.float32)):
        return f"it fills masked scores with {value:g}, which shows where all keys of a query are masked"
    return _then(inner, node, masks=(*inner.masks, Mask("keep" if keeps else "drop", condition, value)))


def _number(value: Any, region: Region) -> float | None:
    """A plain number, also where it is given as a tensor of one."""
    if is_number(value):
        return float(value)
    if isinstance(value, fx.Node) and value.op == "get_attr":
        tensor = region.attribute(value)
        if isinstance(tensor, torch.Tensor) and tensor.numel() == 1 and not isinstance(tensor, torch.nn.Parameter):
            return float(tensor)
    if name_of(value) == "full" and len(value.args) == 2 and is_number(value.args[1]):
        return float(value.args[1])
    return None
