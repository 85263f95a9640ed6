"""Folds a batch norm into the layer before or behind it.

    behind a layer      scale (W x + b) + shift   =  (scale W) x + (scale b + shift)       scale by output
    before a layer      W (scale x + shift) + b   =  (W scale) x + (W shift + b)           scale by input

Source: Jacob et al. 2018, section 3.2; torch.nn.utils.fusion.fuse_conv_bn_weights, which knows no groups and
so takes the wrong channels of a grouped transposed convolution. The arithmetic is float64, the result has the
dtype of W.
"""

from __future__ import annotations

import torch
import torch.fx as fx

from fxopt.contract import Change, Skip
from fxopt.graph import Affine, Effects, Region, also_used, read_affine, source_of, why_shared
from fxopt.modules import Fused, rebuild
from passes.fuse.norm import Norm, is_norm, rank_of, read_norm


def fold_behind(affine: Affine, norm: Norm, region: Region) -> Change | Skip:
    """layer -> bn  =>  layer"""
    calls = _calls_with(affine, norm, region)
    if isinstance(calls, str):
        return _skip(norm.node, region, calls)
    reason = (
        why_shared(affine, region, [site for site, _ in calls])
        or _wrong_layout(affine, norm)
        or _wrong_channels(norm, affine.out_channels)
    )
    if reason:
        return _skip(norm.node, region, reason)
    scale, shift = norm.scale, norm.shift
    weight = affine.weight.detach().double() * _scale_by_output(scale, affine)
    bias = shift if affine.bias is None else affine.bias.detach().double() * scale + shift
    reason = _replace(affine, weight, bias, region)
    if reason:
        return _skip(norm.node, region, reason)
    change = _folded(norm, affine, region)
    for site, follower in calls:
        region.replace(follower, site)
    return change


def fold_before(norm: Norm, affine: Affine, region: Region) -> Change | Skip:
    """bn -> layer  =>  layer"""
    inputs = affine.weight.shape[0] if affine.is_transposed else affine.weight.shape[1] * affine.groups
    scale, shift = norm.scale, norm.shift
    reason = (
        also_used(norm.node, region)
        or why_shared(affine, region, [affine.node])
        or _wrong_layout(affine, norm)
        or _wrong_channels(norm, int(inputs))
        or _shift_reaches_border(affine, shift)
        or _is_written(norm, affine, region)
    )
    if reason:
        return _skip(norm.node, region, reason)
    wide = affine.weight.detach().double()
    weight = wide * _scale_by_input(scale, affine)
    moved = wide * _scale_by_input(shift, affine)
    moved = moved.flatten(2).sum(2) if moved.dim() > 2 else moved
    if affine.is_transposed:  # (in, out / groups): the inputs of each group add up
        moved = moved.reshape(affine.groups, -1, moved.shape[1])
    moved = moved.sum(1).flatten()
    bias = moved if affine.bias is None else affine.bias.detach().double() + moved
    reason = _replace(affine, weight, bias, region)
    if reason:
        return _skip(norm.node, region, reason)
    change = _folded(norm, affine, region)
    affine.node.replace_input_with(norm.node, norm.input)
    region.graph.erase_node(norm.node)
    return change


def _scale_by_output(scale: torch.Tensor, affine: Affine) -> torch.Tensor:
    ones = [1] * (affine.weight.dim() - 2)
    if not affine.is_transposed:
        return scale.reshape(-1, 1, *ones)
    by_group = scale.reshape(affine.groups, 1, -1).expand(-1, affine.weight.shape[0] // affine.groups, -1)
    return by_group.reshape(*affine.weight.shape[:2], *ones)


def _scale_by_input(scale: torch.Tensor, affine: Affine) -> torch.Tensor:
    ones = [1] * (affine.weight.dim() - 2)
    if affine.is_transposed:
        return scale.reshape(-1, 1, *ones)
    outputs, inputs = affine.weight.shape[:2]
    by_group = scale.reshape(affine.groups, 1, inputs).expand(-1, outputs // affine.groups, -1)
    return by_group.reshape(outputs, inputs, *ones)


def _calls_with(affine: Affine, norm: Norm, region: Region) -> list[tuple[fx.Node, fx.Node]] | str:
    """Each call of the layer with the batch norm behind it, or why it is not this one behind all of them."""
    calls = [affine.node] if affine.module is None else region.program.sites(affine.module)
    found = []
    for site in calls:
        if site.graph is not region.graph:
            continue
        reason = also_used(site, region)
        if reason and site is affine.node:
            return reason
        follower = next(iter(site.users), site)
        layer = read_affine(site, region)
        behind = read_norm(follower, region) if is_norm(follower, region) else None
        if reason or not isinstance(behind, Norm) or not isinstance(layer, Affine) or not behind.is_same(norm):
            return f"'{region.qualified(affine.node)}' is also called without it, at {source_of(site) or site.name!r}"
        found.append((site, follower))
    return found


def _wrong_layout(affine: Affine, norm: Norm) -> str | None:
    wanted = affine.weight.dim()
    rank = norm.rank if norm.rank is not None else rank_of(affine.node)
    if rank is None:
        return f"how many dimensions its input has is not known; it folds where these are {wanted}"
    if rank != wanted:
        return f"its input has {rank} dimensions, not {wanted}: axis 1 is not the channels of the layer"
    return None


def _wrong_channels(norm: Norm, channels: int) -> str | None:
    count = norm.mean.numel()
    return None if count == channels else f"it normalises {count} channels, the layer has {channels}"


def _shift_reaches_border(affine: Affine, shift: torch.Tensor) -> str | None:
    if not shift.any() or affine.kind == "linear":
        return None
    point = all(size == 1 for size in affine.weight.shape[2:])
    if affine.is_transposed:
        plain = all(_is_all(affine.options.get(key, default), default) for key, default in
                    (("stride", 1), ("padding", 0), ("output_padding", 0)))  # fmt: skip
        return None if point and plain else "each output of a transposed convolution sums other taps of its shift"
    padding = affine.options.get("padding", 0)
    pads = not (padding == "valid" or (padding == "same" and point) or _is_all(padding, 0))
    if pads and affine.options.get("padding_mode", "zeros") == "zeros":
        return "the convolution pads with zeros behind it: its shift does not reach the border"
    return None


def _is_all(option: object, value: int) -> bool:
    return all(item == value for item in option) if isinstance(option, (tuple, list)) else option == value


def _is_written(norm: Norm, affine: Affine, region: Region) -> str | None:
    writer = Effects(region).written_between(norm.input, norm.node, affine.node)
    return None if writer is None else f"its input is written in place by {region.qualified(writer)!r} meanwhile"


def _replace(affine: Affine, weight: torch.Tensor, bias: torch.Tensor, region: Region) -> str | None:
    """Put the new values in place, or say why they can't be."""
    dtype, module = affine.weight.dtype, affine.module
    new, offset = weight.to(dtype), bias.to(dtype)
    if not all(bound.isfinite() for tensor in (new, offset) for bound in torch.aminmax(tensor)):
        return f"the folded values do not fit {str(dtype).removeprefix('torch.')}"
    if isinstance(module, Fused) and module.weight_fake_quant is not None:
        return "the weight of the layer is fake-quantised already"
    if module is not None:
        region.program.replace_module(module, rebuild(module, type(module), weight=new, bias=offset))
        return None
    assert affine.weight_node is not None
    name = str(affine.weight_node.target)
    trains = affine.weight.requires_grad
    region.swap_parameter(affine.weight_node, new)
    if affine.bias_node is not None:
        region.swap_parameter(affine.bias_node, offset)
        return None
    owner, _, _ = name.rpartition(".")
    added = region.insert_attribute(
        affine.node, region.add_parameter(f"{owner}.bias" if owner else "bias", offset, trainable=trains)
    )
    if len(affine.node.args) > 2:
        affine.node.update_arg(2, added)
    else:
        affine.node.update_kwarg("bias", added)
    return None


def _folded(norm: Norm, affine: Affine, region: Region) -> Change:
    return Change(f"folded into '{region.qualified(affine.node)}'", region.qualified(norm.node), source_of(norm.node))


def _skip(node: fx.Node, region: Region, reason: str) -> Skip:
    return Skip(region.qualified(node), reason, source_of(node))
