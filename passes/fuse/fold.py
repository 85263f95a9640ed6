"""Folds a batch norm into the layer before or behind it.

    behind a layer      scale (W x + b) + shift   =  (scale W) x + (scale b + shift)       scale by output
    before a layer      W (scale x + shift) + b   =  (W scale) x + (W shift + b)           scale by input

Source: Jacob et al. 2018, section 3.2; torch.nn.utils.fusion.fuse_conv_bn_weights, which knows no groups and
so takes the wrong channels of a grouped transposed convolution. The arithmetic is float64, the result has the
dtype of W.
"""

from __future__ import annotations

import torch.fx as fx

from fxopt.contract import Change, Skip
from fxopt.graph import (
    Affine,
    Effects,
    Norm,
    Region,
    also_used,
    is_norm,
    rank_of,
    read_affine,
    read_norm,
    replace_values,
    scale_by_input,
    scale_by_output,
    shift_behind,
    source_of,
    why_shared,
    why_shift_stays,
)  # fmt: skip


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
    weight = affine.weight.detach().double() * scale_by_output(scale, affine)
    bias = shift if affine.bias is None else affine.bias.detach().double() * scale + shift
    reason = replace_values(affine, weight, bias, region)
    if reason:
        return _skip(norm.node, region, reason)
    change = _folded(norm, affine, region)
    for site, follower in calls:
        region.absorb(follower, site)
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
        or why_shift_stays(affine, shift)
        or _is_written(norm, affine, region)
    )
    if reason:
        return _skip(norm.node, region, reason)
    weight = affine.weight.detach().double() * scale_by_input(scale, affine)
    moved = shift_behind(shift, affine)
    bias = moved if affine.bias is None else affine.bias.detach().double() + moved
    reason = replace_values(affine, weight, bias, region)
    if reason:
        return _skip(norm.node, region, reason)
    change = _folded(norm, affine, region)
    region.absorb(norm.node, affine.node)
    affine.node.replace_input_with(norm.node, norm.input)
    region.graph.erase_node(norm.node)
    return change


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


def _is_written(norm: Norm, affine: Affine, region: Region) -> str | None:
    writer = Effects(region).written_between(norm.input, norm.node, affine.node)
    return None if writer is None else f"its input is written in place by {region.qualified(writer)!r} meanwhile"


def _folded(norm: Norm, affine: Affine, region: Region) -> Change:
    return Change(f"folded into '{region.qualified(affine.node)}'", region.qualified(norm.node), source_of(norm.node))


def _skip(node: fx.Node, region: Region, reason: str) -> Skip:
    return Skip(region.qualified(node), reason, source_of(node))
