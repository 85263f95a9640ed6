"""Fuses what follows a layer into it.

act(layer(x))          =>  fused(x)
act(layer(x) + other)  =>  fused(x, other)
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from fxopt.contract import Change, Skip
from fxopt.graph import Affine, Effects, Region, source_of
from fxopt.modules import Activation, Fused
from passes.fuse.activation import read_activation
from passes.fuse.shared import also_used, why_called_elsewhere

_ADDS: frozenset[Any] = frozenset({operator.add, operator.iadd, torch.add, "add", "add_"})
_ADDS_IN_PLACE: frozenset[Any] = frozenset({operator.iadd, "add_"})


def fuse_tail(affine: Affine, region: Region, adds: bool) -> Change | Skip | None:
    """Fuse the activation behind `affine`, and the addition between the two, if `adds`."""
    module = affine.module
    if module is None or (isinstance(module, Fused) and (module.activation is not None or module.adds)):
        return None
    for user in affine.node.users:
        if (activation := read_activation(user, region)) is not None:
            return _fuse_activation(affine, module, user, activation, region)
    if not adds:
        return None
    for user in affine.node.users:
        if user.target in _ADDS and user.op in ("call_function", "call_method") and len(user.users) == 1:
            last = next(iter(user.users))
            activation = read_activation(last, region)
            if isinstance(activation, Activation):
                return _fuse_addition(affine, module, user, last, activation, region)
    return None


def _fuse_activation(
    affine: Affine, module: nn.Module, node: fx.Node, found: Activation | Skip, region: Region
) -> Change | Skip:
    if isinstance(found, Skip):
        return found
    reason = also_used(affine.node, region) or why_called_elsewhere(affine, region, [affine.node])
    if reason is not None:
        return Skip(region.qualified(node), reason, source_of(node))
    change = Change(f"{found} fused into '{region.qualified(affine.node)}'", region.qualified(node), source_of(node))
    region.program.replace_module(module, Fused.of(module, activation=found))
    region.replace(node, affine.node)
    return change


def _fuse_addition(
    affine: Affine, module: nn.Module, add: fx.Node, last: fx.Node, found: Activation, region: Region
) -> Change | Skip | None:
    operands = [*add.args, *add.kwargs.values()]
    if len(operands) != 2 or operands[0] is operands[1] or not all(isinstance(item, fx.Node) for item in operands):
        return None
    other = operands[1] if operands[0] is affine.node else operands[0]
    assert isinstance(other, fx.Node)
    reason = (
        also_used(affine.node, region)
        or why_called_elsewhere(affine, region, [affine.node])
        or _wrong_shapes(affine, add, other)
        or _why_not_later(affine, add, other, region)
    )
    if reason is not None:
        return Skip(region.qualified(add), reason, source_of(add))
    name = region.qualified(affine.node)
    change = Change(f"addition and {found} fused into '{name}'", region.qualified(add), source_of(add))
    region.program.replace_module(module, Fused.of(module, activation=found, adds=True))
    add.prepend(affine.node)  # `other` may be computed after the place where the layer was called
    affine.node.args, affine.node.kwargs = (affine.input, other), {}
    region.replace(last, affine.node)
    region.graph.erase_node(add)
    return change


def _wrong_shapes(affine: Affine, add: fx.Node, other: fx.Node) -> str | None:
    shapes: list[Any] = [getattr(node.meta.get("tensor_meta"), "shape", None) for node in (affine.node, other, add)]
    if None in shapes:
        return "the shapes that it adds are not known; they must be equal"
    if not shapes[0] == shapes[1] == shapes[2]:
        return f"it adds {tuple(shapes[0])} and {tuple(shapes[1])}; the shapes must be equal"
    return None


def _why_not_later(affine: Affine, add: fx.Node, other: fx.Node, region: Region) -> str | None:
    if "output_size" in affine.options:
        return "the layer is called with an output size"
    into_other = add.target in _ADDS_IN_PLACE and add.args[0] is other
    if into_other and not _is_fresh(other, add, region):
        return f"it adds in place into '{region.qualified(other)}', which is not the layer's own output"
    for value in (affine.input, affine.node):
        writer = Effects(region).written_between(value, affine.node, add)
        if writer is not None:
            return f"'{region.qualified(writer)}' writes in place what the layer reads, before the addition"
    return None


def _is_fresh(value: fx.Node, user: fx.Node, region: Region) -> bool:
    """Whether only `user` ever sees the memory of `value`."""
    if value.op in ("placeholder", "get_attr") or len(value.users) > 1:
        return False
    effects = Effects(region)
    return not effects.may_alias(value) and not effects.writes(value)
