"""Scales and shifts by constants, folded into the layer before or behind them.

layer(x) * scale + shift   =>   layer'(x)     W' = scale W       b' = scale b + shift
layer(x * scale + shift)   =>   layer'(x)     W' = W scale       b' = b + W shift
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx

from fxopt.contract import Change, Skip
from fxopt.graph import (
    Affine,
    Effects,
    Region,
    is_written,
    name_of,
    operands,
    order_of_axes,
    rank_of,
    read_affine,
    replace_values,
    scale_by_input,
    scale_by_output,
    shift_behind,
    source_of,
    why_shared,
    why_shift_stays,
)  # fmt: skip
from passes.layout.reading import identity_of, only_user

_RESHAPES: frozenset[Any] = frozenset({operator.getitem, "reshape", "view", "unsqueeze", "flatten"})


@dataclass(frozen=True)
class Scale:
    """scale * value + shift beside a layer.

    Attributes:
        node: the call.
        value: what is scaled.
        affine: the layer.
        behind: whether the layer comes first.
        scale, shift: in float64, one value a channel.
    """

    node: fx.Node
    value: fx.Node
    affine: Affine
    behind: bool
    scale: torch.Tensor
    shift: torch.Tensor


def find_scale(node: fx.Node, region: Region) -> Scale | Skip | None:
    """The scale or shift that `node` is, with the layer that can take it; a `Skip` where that one must not."""
    name, both = name_of(node), operands(node)
    if name not in ("add", "sub", "mul", "div") or both is None:
        return None
    swapped = _constant(both[0], region) is not None
    value, constant = both[::-1] if swapped else both
    tensor = _constant(constant, region)
    if tensor is None or not isinstance(value, fx.Node) or (swapped and name == "div"):
        return None
    beside = _layer_before(value, region), _layer_behind(node, region)
    reason = None
    for behind, (affine, axis) in ((True, beside[0]), (False, beside[1])):
        if affine is None or isinstance(affine, Skip) or axis is None:
            continue
        channels = affine.out_channels if behind else _inputs(affine)
        by_channel = _by_channel(tensor, axis, rank_of(value), channels)
        if by_channel is None or rank_of(node) != rank_of(value):
            continue
        ones, zeros = torch.ones_like(by_channel), torch.zeros_like(by_channel)
        scale = {"mul": by_channel, "div": 1 / by_channel, "sub": -ones if swapped else ones}.get(name, ones)
        shift = {"add": by_channel, "sub": by_channel if swapped else -by_channel}.get(name, zeros)
        found = Scale(node, value, affine, behind, scale, shift)
        reason = reason or (why := _why_not(found, constant, region))
        if why is None:
            return found
    return Skip(region.qualified(node), reason, source_of(node)) if reason is not None else None


def fold_scale(node: fx.Node, region: Region) -> Change | Skip | None:
    """Fold the scale or shift that `node` is."""
    found = find_scale(node, region)
    if not isinstance(found, Scale):
        return found
    affine, wide = found.affine, found.affine.weight.detach().double()
    reason = why_shared(affine, region, [affine.node])
    if reason is not None:
        return Skip(region.qualified(node), reason, source_of(node))
    old = wide.new_zeros(affine.out_channels) if affine.bias is None else affine.bias.detach().double()
    if found.behind:
        weight, bias = wide * scale_by_output(found.scale, affine), found.scale * old + found.shift
    else:
        weight, bias = wide * scale_by_input(found.scale, affine), old + shift_behind(found.shift, affine)
    stays_without = affine.bias is None and not found.shift.any()
    reason = replace_values(affine, weight, None if stays_without else bias, region)
    if reason is not None:
        return Skip(region.qualified(node), reason, source_of(node))
    change = Change(f"folded into '{region.qualified(affine.node)}'", region.qualified(node), source_of(node))
    region.absorb(node, affine.node)
    node.replace_all_uses_with(found.value)
    region.graph.erase_node(node)
    return change


def _why_not(found: Scale, constant: Any, region: Region) -> str | None:
    if region.training:
        return "in training mode it and the layer learn by themselves"
    affine = found.affine
    source = constant
    while isinstance(source, fx.Node) and source.op != "get_attr":
        source = source.args[0]
    if isinstance(source, fx.Node) and is_written(region.attribute(source), region.program):
        return "the graph writes into what it scales or shifts by"
    if _dtype(found.node) != _dtype(found.value):
        return f"it gives {_dtype(found.node)} for {_dtype(found.value)}"
    if not (found.scale.isfinite().all() and found.shift.isfinite().all()):
        return "it scales or shifts by what is not finite"
    if not found.behind:
        if (reason := why_shift_stays(affine, found.shift)) is not None:
            return reason
        effects = Effects(region)
        writer = effects.written_between(found.value, found.node, affine.node)
        if writer is not None or effects.writes(found.node):
            return "it, or its input, is written in place before it is used"
    return None


def _constant(value: Any, region: Region) -> torch.Tensor | None:
    """A number, parameter or buffer in float64."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(float(value), dtype=torch.float64)
    if not isinstance(value, fx.Node):
        return None
    if value.op == "get_attr":
        tensor = region.attribute(value)
        plain = isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        return tensor.detach().double() if plain else None
    reshapes = value.op in ("call_function", "call_method") and value.target in _RESHAPES and not value.kwargs
    inner = _constant(value.args[0], region) if reshapes else None
    if inner is None or any(isinstance(item, fx.Node) for item in value.all_input_nodes[1:]):
        return None
    if value.op == "call_function":
        return inner[value.args[1]]  # type: ignore[index]
    return getattr(inner, str(value.target))(*value.args[1:])  # type: ignore[no-any-return]


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(node.meta.get("tensor_meta"), "dtype", None)


def _by_channel(constant: torch.Tensor, axis: int, rank: int | None, channels: int) -> torch.Tensor | None:
    """One value a channel, where that is what broadcasting a constant over a value of that rank gives."""
    if constant.numel() == 1:
        return constant.reshape(1).expand(channels)
    if rank is None or constant.dim() > rank:
        return None
    shape = (1,) * (rank - constant.dim()) + tuple(constant.shape)
    return constant.flatten() if shape[axis] == constant.numel() == channels else None


def _layer_before(value: fx.Node, region: Region) -> tuple[Affine | Skip | None, int | None]:
    """The layer that made `value`, and which axis of `value` counts its outputs."""
    node, moves = value, list[list[int]]()
    while only_user(node) is not None:
        rank = rank_of(node)
        affine = read_affine(node, region)
        if affine is not None:
            if isinstance(affine, Skip) or not affine.is_bare or rank is None:
                return affine if isinstance(affine, Skip) else None, None
            axis = rank - 1 if affine.kind == "linear" else 1 - (affine.weight.dim() - rank)
            for order in reversed(moves):
                axis = order.index(axis)
            return affine, axis
        inner = identity_of(node, region, [])
        if inner is node:
            moved = _order(node, rank)
            if moved is None or not isinstance(node.args[0], fx.Node):
                break
            moves.append(moved)
            inner = node.args[0]
        node = inner
    return None, None


def _layer_behind(node: fx.Node, region: Region) -> tuple[Affine | Skip | None, int | None]:
    """The layer that alone takes `node`, and which axis counts its inputs."""
    user, rank = only_user(node), rank_of(node)
    affine = read_affine(user, region) if user is not None and len(node.users) == 1 else None
    if not isinstance(affine, Affine) or affine.input is not node or rank is None:
        return None, None
    return affine, rank - 1 if affine.kind == "linear" else 1 - (affine.weight.dim() - rank)


def _order(node: fx.Node, rank: int | None) -> list[int] | None:
    """The axes of the input in the order of the output, for what only moves them, or memory."""
    if name_of(node) == "contiguous" and rank is not None and len(node.args) == 1 and not node.kwargs:
        return list(range(rank))
    return order_of_axes(node)


def _inputs(affine: Affine) -> int:
    return int(affine.weight.shape[0] if affine.is_transposed else affine.weight.shape[1] * affine.groups)
