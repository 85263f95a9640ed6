"""Masks as attention takes them: one tensor, or the word that each query sees what comes before it."""

from __future__ import annotations

import math
import operator
from itertools import groupby
from typing import Any

import torch
import torch.fx as fx

from fxopt.graph import Effects, Region, name_of
from passes.attention.call import dtype_of, given, shape_of
from passes.attention.scores import Mask, Scores


def attention_mask(scores: Scores, before: fx.Node, region: Region) -> dict[str, Any]:
    """`attn_mask` or `is_causal`, or neither.

    Booleans stay booleans where all of them fill with minus infinity; else all becomes what is added.
    """
    masks = scores.masks
    if not masks:
        return {}
    if len(masks) == 1 and _is_causal(masks[0], shape_of(scores.product), before, region):
        return {"is_causal": True}
    insert = region.insert_function
    aligned = [Mask(mask.kind, _aligned(mask, scores, before, region), mask.fill) for mask in masks]
    total = None
    # In their order: a fill replaces what was filled or added before it, and is not added to that.
    for fill, group in groupby(aligned, lambda mask: None if mask.kind == "add" else mask.fill):
        alike = list(group)
        if fill is None:
            total = _all(operator.add, [*([] if total is None else [total]), *(m.node for m in alike)], before, region)
            continue
        keep = _all(operator.and_, [_keep(mask, before, region) for mask in alike], before, region)
        if len(alike) == len(masks) and math.isinf(fill):
            return {"attn_mask": keep}
        if total is None:
            total = insert(before, torch.zeros_like, (keep,), {"dtype": dtype_of(scores.query)})
        total = insert(before, torch.where, (keep, total, fill))
    return {"attn_mask": total}


def _all(function: Any, nodes: list[fx.Node], before: fx.Node, region: Region) -> fx.Node:
    total = nodes[0]
    for node in nodes[1:]:
        total = region.insert_function(before, function, (total, node))
    return total


def _keep(mask: Mask, before: fx.Node, region: Region) -> fx.Node:
    return mask.node if mask.kind == "keep" else region.insert_function(before, torch.logical_not, (mask.node,))


def _aligned(mask: Mask, scores: Scores, before: fx.Node, region: Region) -> fx.Node:
    """A mask with as many dimensions as attention has, or two."""
    node, own, graph = mask.node, len(shape_of(mask.node) or ()), region.graph
    three = len(shape_of(scores.query) or ()) == 3
    with graph.inserting_before(before):
        if mask.split is not None:
            outer, windows, *rest = mask.split
            if outer == -1:
                outer = graph.call_function(operator.floordiv, (graph.call_method("size", (scores.query, 0)), windows))
            node = graph.call_method("expand", (node, outer, windows, *rest))
            own, node = 3 if three else 4, graph.call_method("flatten", (node, 0, 1))
        if own == 3:
            return graph.call_method("unsqueeze", (node, 1 if three else 0))
        for _ in range(own, 2):
            node = graph.call_method("unsqueeze", (node, 0))
    return node


def _is_causal(mask: Mask, scores: tuple[int, ...] | None, before: fx.Node, region: Region) -> bool:
    """Whether a mask is made to be triangular, the first query seeing the first key alone, and is so still."""
    node, kind = _origin(mask.node), mask.kind
    made, effects = node, Effects(region)
    if mask.split is not None or not isinstance(node, fx.Node):
        return False
    name = name_of(node)
    if name in ("logical_not", "invert") or (name in ("eq", "ne") and node.args[1:] == (0,)):
        if name != "ne":
            kind = "drop" if kind == "keep" else "keep"
        node = _origin(node.args[0])
    asked = given(node, "input", "diagonal") if isinstance(node, fx.Node) else {}
    source = asked.get("input")
    if scores is None or not isinstance(source, fx.Node) or shape_of(source) != scores[-2:]:
        return False
    lives = ((source, node), (node, before), (made, before))
    if any(effects.written_between(value, value, end) for value, end in lives):
        return False
    filled = given(source, "size", "fill_value").get("fill_value") if name_of(source) == "full" else None
    if kind == "add":
        return filled == -math.inf and name_of(node) == "triu" and asked.get("diagonal", 0) == 1
    ones = filled == 1 or name_of(source) in ("ones", "ones_like", "new_ones")
    return ones and (name_of(node), kind, asked.get("diagonal", 0)) in (("triu", "drop", 1), ("tril", "keep", 0))


def _origin(node: Any) -> Any:
    """What a mask was before axes were added to it and it was cast."""
    while isinstance(node, fx.Node) and (
        name_of(node) in ("bool", "to", "unsqueeze", "contiguous", "view", "reshape") or _adds_axes(node)
    ):
        node = node.args[0]
    return node


def _adds_axes(node: fx.Node) -> bool:
    """Whether a call only adds axes: `mask[None, None]`."""
    index = node.args[1] if name_of(node) == "getitem" else None
    return isinstance(index, tuple) and all(item is None or item == slice(None) for item in index)
