"""In training: the convolution and its batch norm as one module that runs both, ready for quantisation.

    bn(conv(x))  =>  fused(x), which holds `bn` as a child and runs the same two steps

Where each mode has a graph of its own, both call the fused module. Nothing is folded, since the batch norm still
normalises by the batch and learns. The state of the batch norm moves from `bn1.` to `conv1.bn.`; a state_dict with the
former names still loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.fx as fx
from torch import nn

from fxopt.contract import Change, Skip
from fxopt.graph import Affine, BatchNorm, Region, also_used, rank_of, source_of, why_called_elsewhere, why_not_plain
from fxopt.modules import Fused, rebuild
from passes.fuse.written_out import as_module

_Call = tuple[Region, fx.Node, fx.Node]


@dataclass(frozen=True)
class FormerNames:
    """Lets a state_dict from before the fusion load: a hook of the root of all these names."""

    old: tuple[str, ...]
    new: tuple[str, ...]

    def __call__(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Move what is there under old names to the new ones."""
        for name in self.old:
            former = f"{prefix}{name}."
            for key in [key for key in state if key.startswith(former) and "." not in key.removeprefix(former)]:
                value = state.pop(key)
                for new in self.new:
                    state[f"{prefix}{new}.{key.removeprefix(former)}"] = value


def join(affine: Affine, node: fx.Node, region: Region) -> Change | Skip:
    """Make one module of a layer and the batch norm `node` behind it."""
    where, line = region.qualified(node), source_of(node)
    called = node if node.op == "call_module" else as_module(node, region)
    if affine.module is None or called is None:
        return Skip(where, "in training mode only modules are joined, and this is a function", line)
    norm = region.submodule(called)
    assert isinstance(norm, BatchNorm)
    calls = _calls_of_both(affine.module, norm, region)
    reason = _why_not(affine, norm, called, region, calls)
    if reason is not None and called is not node:
        return Change(f"called as one {type(norm).__name__}, not joined: {reason}", where, line)
    if reason is not None:
        return Skip(where, reason, line)
    program, layer = region.program, affine.module
    bare = rebuild(norm, type(norm))
    bare._modules = {}
    fused = Fused.of(layer, bn=bare)
    names = FormerNames(tuple(program.paths(norm)), tuple(f"{path}.bn" for path in program.paths(layer)))
    # Its activation is called where it was, and its `training` read.
    program.replace_module(norm, _holder(norm) if norm._modules else nn.Identity().train(norm.training))
    program.replace_module(layer, fused)
    for each, site, follower in calls:
        each.absorb(follower, site)
        each.replace(follower, site)
    # The public form of this hook keeps a reference to the module, which its own pickle can't follow.
    program.root._register_load_state_dict_pre_hook(names)  # type: ignore[no-untyped-call]
    return Change(f"joined with '{region.qualified(affine.node)}' for training, not folded", where, line)


def _calls_of_both(layer: nn.Module, norm: nn.Module, region: Region) -> list[_Call]:
    """Where the layer is called with the batch norm, which is all that uses it, behind it."""
    found = []
    for site in region.program.sites(layer):
        each, follower = region.program.region_of(site), next(iter(site.users), site)
        behind = follower.op == "call_module" and each.submodule(follower) is norm
        if behind and also_used(site, each) is None:
            found.append((each, site, follower))
    return found


def _holder(norm: BatchNorm) -> nn.Module:
    """What is left of a batch norm whose statistics and parameters are elsewhere."""
    holder = nn.Module().train(norm.training)
    holder._modules = dict(norm._modules)
    return holder


def _why_not(affine: Affine, norm: BatchNorm, node: fx.Node, region: Region, calls: list[_Call]) -> str | None:
    reason = why_not_plain(norm, next(k for k in type(norm).__mro__ if k.__module__.startswith("torch.nn.")))
    if reason is not None:
        return reason
    if norm.running_var is None:
        return "it keeps no running statistics, by which a joined weight would be quantised"
    if not norm.training:
        return "it is in evaluation mode while the model trains; call .eval() on the model to fold it"
    if (reason := also_used(affine.node, region)) is not None:
        return reason
    followers = {follower for _, _, follower in calls}
    others = {*region.program.sites(norm)} - followers
    is_repeated = len({site.graph for _, site, _ in calls}) < len(calls)
    if others or is_repeated or region.program.inside_opaque(norm):
        return "it is called at more than one place"
    for name, tensor in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
        for reader in {*region.program.readers(tensor)} - followers:
            return f"the forward also reads its {name} itself, at {source_of(reader) or reader.name!r}"
    wanted, rank = affine.weight.dim(), rank_of(affine.node)
    if affine.kind in ("linear", "conv1d", "conv_transpose1d") and rank != wanted:
        known = "not known" if rank is None else str(rank)
        return f"the dimensions of its input must be {wanted} and are {known}"
    if norm.num_features != affine.out_channels:
        return f"it normalises {norm.num_features} channels, the layer has {affine.out_channels}"
    return why_called_elsewhere(affine, region, [site for _, site, _ in calls])
