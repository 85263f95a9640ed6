"""2-d convolutions in channels_last: weights stored so, inputs converted where they enter, outputs as they were."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.fx as fx

from fxopt.contract import Change, Skip
from fxopt.engines.strides import hide, why_noticed
from fxopt.graph import Affine, Effects, Region, inherit, rank_of, read_affine, source_of

_KINDS = ("conv2d", "conv_transpose2d")


def run_channels_last(region: Region) -> Iterator[Change | Skip]:
    """Let all convolutions of a graph compute in channels_last."""
    convolutions = _convolutions(region)
    entries = _entries(convolutions)
    weights = {id(conv.weight): conv for conv in convolutions if not _is_so(conv.weight)}
    if not weights and not entries:
        return
    first = convolutions[0]
    if region.is_spared(first.node):
        return
    where = region.qualified(first.node)
    for conv in weights.values():
        if conv.module is not None and region.program.inside_opaque(conv.module):
            unseen = f"the Python code around '{region.qualified(conv.node)}' may call it, unseen by the graph"
            yield Skip(where, unseen, source_of(conv.node))
            return
    # The weights are those of the other mode's graph too.
    regions = [one for one in region.program.regions if one.module is region.module]
    reasons = (why_noticed(one, {conv.node for conv in _convolutions(one)}) for one in regions)
    reason = next((reason for noticed in reasons for reason in noticed.values()), None)
    if reason is not None:
        yield Skip(where, f"it and the others are not computed in channels_last: {reason}", source_of(first.node))
        return
    for conv in weights.values():
        assert isinstance(conv.weight, torch.nn.Parameter)
        region.program.replace_parameter(
            conv.weight, conv.weight.detach().contiguous(memory_format=torch.channels_last)
        )
    hide(region)
    effects = Effects(region)
    for entry, users in entries.items():
        made = None
        for user in sorted(users):
            if made is None or effects.written_between(entry, made, user):
                with region.graph.inserting_before(user):
                    made = region.graph.call_method("contiguous", (entry,), {"memory_format": torch.channels_last})
                inherit(made, entry)
            user.replace_input_with(entry, made)
    count = len({id(conv.node) for conv in convolutions})
    more = f" and {count - 1} more" if count > 1 else ""
    yield Change(f"computed in channels_last{more}", where, source_of(first.node))


def _convolutions(region: Region) -> list[Affine]:
    layers = [layer for node in region.graph.nodes if isinstance(layer := read_affine(node, region), Affine)]
    return [layer for layer in layers if layer.kind in _KINDS and rank_of(layer.input) == 4]


def _entries(convolutions: list[Affine]) -> dict[fx.Node, list[fx.Node]]:
    """The values that reach a convolution and come from none, each with the convolutions that take it."""
    nodes = {conv.node for conv in convolutions}
    after: set[fx.Node] = set()
    for node in convolutions[0].node.graph.nodes if convolutions else ():
        if node in nodes or not after.isdisjoint(node.all_input_nodes):
            after.add(node)
    found: dict[fx.Node, list[fx.Node]] = {}
    for conv in convolutions:
        if conv.input not in after and conv.input.kwargs.get("memory_format") is not torch.channels_last:
            found.setdefault(conv.input, []).append(conv.node)
    return found


def _is_so(weight: torch.Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last)
