"""Fuses what follows a layer into it.

act(layer(x))          =>  fused(x)
act(layer(x) + other)  =>  fused(x, other)
"""

from __future__ import annotations

from typing import Any

import torch.fx as fx

from fxopt.contract import Change, Skip
from fxopt.graph import Affine, Region, also_used, source_of, why_called_elsewhere, why_other_mode
from fxopt.graph.effects import ADDS, ADDS_INTO, Effects
from fxopt.modules import Activation, Fused, fused_call
from passes.fuse.activation import read_activation

_IDEMPOTENT = ("relu", "relu6", "hardtanh")


def fuse_tail(affine: Affine, region: Region, adds: bool) -> Change | Skip | None:
    """Fuse the activation behind `affine`, and the addition between the two, if `adds`."""
    module = affine.module
    # A batch norm that trains may stand between the layer and what is fused behind it.
    if (module.activation is not None or module.adds) if isinstance(module, Fused) else not affine.is_bare:
        return None
    users = [user for user in affine.node.users if not region.is_spared(user)]
    for user in users:
        if (activation := read_activation(user, region)) is not None:
            return _fuse_activation(affine, user, activation, region)
    if not adds:
        return None
    for user in users:
        if user.target in ADDS and user.op in ("call_function", "call_method") and len(user.users) == 1:
            last = next(iter(user.users))
            activation = read_activation(last, region)
            if isinstance(activation, Activation):
                return _fuse_addition(affine, user, last, activation, region)
    return None


def _fuse_activation(affine: Affine, node: fx.Node, found: Activation | Skip, region: Region) -> Change | Skip:
    if isinstance(found, Skip):
        return found
    reason = (
        also_used(affine.node, region)
        or why_called_elsewhere(affine, region, [affine.node])
        or why_other_mode(affine.node, node)
    )
    if reason is not None:
        return Skip(region.qualified(node), reason, source_of(node))
    change = Change(f"{found} fused into '{region.qualified(affine.node)}'", region.qualified(node), source_of(node))
    region.absorb(node, affine.node, repeatable=found.name in _IDEMPOTENT)
    _attach(affine, found, None, region)
    region.replace(node, affine.node)
    return change


def _fuse_addition(
    affine: Affine, add: fx.Node, last: fx.Node, found: Activation, region: Region
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
        or why_other_mode(affine.node, last)
        or _why_not_later(affine, add, other, region)
    )
    if reason is not None:
        return Skip(region.qualified(add), reason, source_of(add))
    name = region.qualified(affine.node)
    change = Change(f"addition and {found} fused into '{name}'", region.qualified(add), source_of(add))
    region.absorb(add, affine.node, passes_on=False)
    region.absorb(last, affine.node, repeatable=found.name in _IDEMPOTENT)
    add.prepend(affine.node)  # `other` may be computed after the place where the layer was called
    _attach(affine, found, other, region)
    region.replace(last, affine.node)
    region.graph.erase_node(add)
    return change


def _attach(affine: Affine, activation: Activation, other: fx.Node | None, region: Region) -> None:
    """Let the call of the layer add `other`, where there is one, and compute the activation."""
    node, module = affine.node, affine.module
    if module is not None:
        region.program.replace_module(module, Fused.of(module, activation=activation, adds=other is not None))
        if other is not None:
            node.args, node.kwargs = (affine.input, other), {}
        return
    added = {} if other is None else {"other": other}
    tail = {"kind": affine.kind, "activation": activation.name, "arguments": activation.arguments}
    node.target = fused_call
    node.args = (affine.input, affine.weight_node, affine.bias_node)
    node.kwargs = {**added, **tail, **affine.options}


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
    into_other = add.target in ADDS_INTO and add.args[0] is other
    if into_other and not Effects(region).is_fresh(other):
        return f"it adds in place into '{region.qualified(other)}', which is not the layer's own output"
    for value in (affine.input, affine.node):
        writer = Effects(region).written_between(value, affine.node, add)
        if writer is not None:
            return f"'{region.qualified(writer)}' writes in place what the layer reads, before the addition"
    return None
