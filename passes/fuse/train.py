"""In training: the convolution and its batch norm as one module that runs both, ready for quantisation.

    bn(conv(x))  =>  fused(x), which holds `bn` as a child and runs the same two steps

Nothing is folded, since the batch norm still normalises by the batch and learns. The state of the batch norm
moves from `bn1.` to `conv1.bn.`; a state_dict with the former names still loads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.fx as fx
from torch import nn

from fxopt.contract import Change, Skip
from fxopt.graph import Affine, BatchNorm, Region, also_used, rank_of, source_of, why_called_elsewhere, why_not_plain
from fxopt.modules import Fused


@dataclass(frozen=True)
class FormerNames:
    """Lets a state_dict from before the fusion load: a hook of the root of all these names."""

    old: tuple[str, ...]
    new: tuple[str, ...]

    def __call__(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Move what is there under old names to the new ones."""
        for name in self.old:
            former = f"{prefix}{name}."
            for key in [key for key in state if key.startswith(former)]:
                value = state.pop(key)
                for new in self.new:
                    state[f"{prefix}{new}.{key.removeprefix(former)}"] = value


def join(affine: Affine, node: fx.Node, region: Region) -> Change | Skip:
    """Make one module of a layer and the batch norm `node` behind it."""
    where, line = region.qualified(node), source_of(node)
    reason = _why_not(affine, node, region)
    if reason is not None:
        return Skip(where, reason, line)
    norm = region.submodule(node)
    assert affine.module is not None and isinstance(norm, BatchNorm)
    fused = Fused.of(affine.module, bn=norm)
    program, layer = region.program, affine.module
    names = FormerNames(tuple(program.paths(norm)), tuple(f"{path}.bn" for path in program.paths(layer)))
    program.replace_module(norm, nn.Identity().train(norm.training))
    program.replace_module(layer, fused)
    region.absorb(node, affine.node)
    region.replace(node, affine.node)
    # The public form of this hook keeps a reference to the module, which its own pickle can't follow.
    program.root._register_load_state_dict_pre_hook(names)  # type: ignore[no-untyped-call]
    return Change(f"joined with '{region.qualified(affine.node)}' for training, not folded", where, line)


def _why_not(affine: Affine, node: fx.Node, region: Region) -> str | None:
    if affine.module is None or node.op != "call_module":
        return "in training mode only modules are joined, and this is a function"
    norm = region.submodule(node)
    assert isinstance(norm, BatchNorm)
    reason = why_not_plain(norm, next(k for k in type(norm).__mro__ if k.__module__.startswith("torch.nn.")))
    if reason is not None:
        return reason
    if norm.running_var is None:
        return "it keeps no running statistics, by which a joined weight would be quantised"
    if not norm.training:
        return "it is in evaluation mode while the model trains; call .eval() on the model to fold it"
    if len(region.program.sites(norm)) > 1 or region.program.inside_opaque(norm):
        return "it is called at more than one place"
    wanted, rank = affine.weight.dim(), rank_of(affine.node)
    if affine.kind in ("linear", "conv1d", "conv_transpose1d") and rank != wanted:
        known = "not known" if rank is None else str(rank)
        return f"the dimensions of its input must be {wanted} and are {known}"
    if norm.num_features != affine.out_channels:
        return f"it normalises {norm.num_features} channels, the layer has {affine.out_channels}"
    return also_used(affine.node, region) or why_called_elsewhere(affine, region, [affine.node])
