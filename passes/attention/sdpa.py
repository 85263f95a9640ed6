"""Attention that is written out.

dropout( softmax( mask( scale (q k^T) ) ) ) v   =>   F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)

Source: Vaswani et al. 2017; Dao et al. 2022.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.capture.modes import select
from fxopt.contract import Change, Skip
from fxopt.graph import Effects, Region, hide_strides, inherit, name_of, operands, source_of, why_not_plain, why_noticed
from passes.attention.call import dtype_of, given, is_cast, is_last, is_number, is_of_sizes, shape_of, why_written
from passes.attention.keys import transposed, ungrouped
from passes.attention.masks import attention_mask
from passes.attention.scores import Scores, read_scores


@dataclass(frozen=True)
class _Weights:
    """The way from the softmax to the product with the values.

    Attributes:
        product: that product.
        values: its right operand.
        chain: the calls from the softmax on, without the product.
        dropout: the call of it, if there is one.
    """

    product: fx.Node
    values: fx.Node
    chain: tuple[fx.Node, ...]
    dropout: fx.Node | None


def recognise_attention(node: fx.Node, region: Region) -> Change | Skip | None:
    """The attention around `node`, its softmax, if it is one."""
    source = _softmax_of(node, region)
    scores = None if source is None else read_scores(source, region)
    weights = None if scores is None else _weights(node, region)
    if scores is None or weights is None:
        return None
    if isinstance(scores, Scores):
        reason = weights if isinstance(weights, str) else _why_not(scores, weights, region)
    else:
        reason = scores
    if reason is None and isinstance(scores, Scores) and isinstance(weights, _Weights):
        return _replace(scores, weights, region)
    return Skip(region.qualified(node), reason or "", source_of(node))


def _softmax_of(node: fx.Node, region: Region) -> fx.Node | None:
    """What a softmax over the last axis is applied to."""
    if node.op == "call_module":
        module = region.submodule(node)
        if not isinstance(module, nn.Softmax) or why_not_plain(module, nn.Softmax) is not None:
            return None
        asked = {"input": node.args[0] if node.args else None, "dim": module.dim}
    elif name_of(node) in ("softmax", "_softmax"):
        asked = given(node, "input", "dim")
    else:
        return None
    source = asked.get("input")
    return source if isinstance(source, fx.Node) and is_last(asked.get("dim"), source) else None


def _weights(softmax: fx.Node, region: Region) -> _Weights | str | None:
    chain, dropout = [softmax], None
    while True:
        last = chain[-1]
        products = [user for user in last.users if name_of(user) == "matmul"]
        if len(last.users) > 1 and (products or any(is_cast(user) or _drops(user, region) for user in last.users)):
            others = [repr(region.qualified(user)) for user in last.users if user not in products[:1]]
            return f"the attention weights are used by {', '.join(others)} too"
        if len(last.users) != 1:
            return None
        user = next(iter(last.users))
        if user in products:
            both = operands(user)
            if both is None or both[0] is not last or not isinstance(both[1], fx.Node):
                return None
            return _Weights(user, both[1], tuple(chain), dropout)
        if _drops(user, region):
            if dropout is not None:
                return f"the attention weights are dropped twice, by '{region.qualified(user)}' too"
            dropout = user
        elif not is_cast(user):
            return None
        chain.append(user)


def _drops(node: fx.Node, region: Region) -> bool:
    if node.op == "call_module":
        module = region.submodule(node)
        return isinstance(module, nn.Dropout) and why_not_plain(module, nn.Dropout) is None
    return name_of(node) == "dropout"


def _why_not(scores: Scores, weights: _Weights, region: Region) -> str | None:
    inputs = (scores.query, scores.keys, weights.values)
    shapes = [shape_of(value) for value in inputs]
    if any(shape is None or len(shape) < 3 for shape in shapes):
        return f"queries, keys and values have the shapes {shapes}; each must have 3 dimensions or more"
    if len({shape[:-2] for shape in shapes if shape is not None}) > 1:
        return f"queries, keys and values differ in the sizes before the last two: {shapes}"
    if len({dtype_of(value) for value in (*inputs, weights.product)}) > 1:
        return "queries, keys and values differ in dtype"
    if shape_of(scores.chain[-1]) != shape_of(scores.product):
        return "what the scores are scaled or masked with has more dimensions than they have"
    if scores.scale <= 0:
        return f"its scale is {scores.scale:g}"
    for node, follower in zip(scores.chain, (*scores.chain[1:], weights.chain[0]), strict=True):
        others = [repr(region.qualified(user)) for user in node.users if user not in (follower, *weights.chain)]
        if others:
            return f"the scores are used by {', '.join(others)} too"
    for mask in scores.masks:
        if mask.kind == "add" and dtype_of(mask.node) != dtype_of(scores.query):
            return f"what is added to the scores is {dtype_of(mask.node)}, the queries are {dtype_of(scores.query)}"
    for value in (*inputs, *(mask.node for mask in scores.masks), *(factor for factor, _ in scores.factors)):
        reason = why_written(value, scores.product, weights.product, region)
        if reason is not None:
            return reason
    return why_noticed(weights.product, region) or _why_not_drawn_later(weights, region)


def _why_not_drawn_later(weights: _Weights, region: Region) -> str | None:
    """What draws random numbers after the dropout and before the product, which is where attention will draw."""
    effects, node = Effects(region), weights.dropout
    while node is not None and region.training and (node := node.next) is not weights.product:
        if effects.is_random(node):
            return f"its dropout would draw random numbers after '{region.qualified(node)}'"
    return None


def _replace(scores: Scores, weights: _Weights, region: Region) -> Change | None:
    end = weights.product
    if region.is_spared(end):
        return None
    where, line = region.qualified(end), source_of(end)
    options: dict[str, Any] = {}
    dropout = _dropout(weights.dropout, end, region)
    if dropout:
        options["dropout_p"] = dropout
    query, scale = _unscaled(scores.query, scores.scale, end, region)
    numbers = [(factor, sign) for factor, sign in scores.factors if is_of_sizes(factor)]
    for factor, sign in scores.factors:
        if (factor, sign) not in numbers:
            query = region.insert_function(end, torch.mul if sign > 0 else torch.div, (query, factor))
    keys = transposed(scores.keys, end, region)
    keys, scale = _unscaled(keys, scale, end, region)
    values = weights.values
    shape = shape_of(scores.query)
    assert shape is not None
    groups = ungrouped(keys, end, region), ungrouped(values, end, region)
    if groups[0] is not None and groups[1] is not None and groups[0][1] == groups[1][1]:
        keys, values = groups[0][0], groups[1][0]
        options["enable_gqa"] = True
    options |= attention_mask(scores, end, region)
    inputs = [query, keys, values]
    if len(shape) == 3:  # the fast kernels take batch and heads
        inputs = [_method(end, "unsqueeze", (value, 1), region) for value in inputs]
    options["scale"] = scale
    for factor, sign in numbers:
        by = operator.mul if sign > 0 else operator.truediv
        options["scale"] = region.insert_function(end, by, (options["scale"], factor))
    made = region.insert_function(end, F.scaled_dot_product_attention, tuple(inputs), options)
    if len(shape) == 3:
        made = _method(end, "squeeze", (made, 1), region)
    masked = [mask for mask in ("attn_mask", "is_causal") if mask in options]
    region.replace(end, inherit(made, end))
    for node in (*reversed(weights.chain), *reversed(scores.chain)):  # a dropout would not count as dead
        region.graph.erase_node(node)
    hide_strides(made, region)
    what = "scaled_dot_product_attention" + (f" with {masked[0]}" if masked else "")
    return Change(f"computed by {what}", where, line)


def _unscaled(value: fx.Node, scale: float, end: fx.Node, region: Region) -> tuple[fx.Node, float]:
    """What is scaled by positive numbers for nobody else, and the scale with these numbers.

    Only as far as what is scaled still has the same values at `end`: it may be scaled in place.
    """
    effects = Effects(region)
    while name_of(value) in ("mul", "div") and len(value.users) == 1:
        both: tuple[Any, Any] = operands(value) or (None, None)
        inner, by = both
        divides = name_of(value) == "div"
        if is_number(inner) and not divides:
            inner, by = by, inner
        if not is_number(by) or by <= 0 or not isinstance(inner, fx.Node) or dtype_of(inner) != dtype_of(value):
            break
        if effects.written_between(inner, value.prev, end):
            break
        value, scale = inner, scale / by if divides else scale * by
    return value, scale


def _dropout(node: fx.Node | None, before: fx.Node, region: Region) -> Any:
    """The probability to drop with, which depends on the mode."""
    if node is None:
        return 0.0
    if node.op == "call_module":
        module = region.submodule(node)
        assert isinstance(module, nn.Dropout)
        p: Any = module.p
        training: Any = region.insert_attribute(before, f"{node.target}.training") if p else False
    else:
        asked = given(node, "input", "p", "train" if node.target is torch.dropout else "training")
        p, training = asked.get("p", 0.5), asked.get("training", asked.get("train", True))
    if training is False or p == 0:
        return 0.0
    return p if training is True else region.insert_function(before, select, (training, p, 0.0))


def _method(before: fx.Node, name: str, args: tuple[Any, ...], region: Region) -> fx.Node:
    with region.graph.inserting_before(before):
        return region.graph.call_method(name, args)
