"""merge: parallel linear layers on one input as one."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, ClassVar

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.contract import Change, Pass, Promise, Skip
from fxopt.graph import (
    Affine,
    Effects,
    Region,
    hide_strides,
    inherit,
    read_affine,
    source_of,
    why_noticed,
    why_other_mode,
)
from passes.merge.layer import Layer
from passes.merge.state import FormerParameters


@dataclass(frozen=True)
class Merge(Pass):
    """Computes parallel linear layers on one input as one: queries, keys and values, or gate and up.

        q, k, v = Wq x + bq, Wk x, Wv x + bv   =>   q, k, v = split([Wq; Wk; Wv] x + [bq; 0; bv])

    Layers are modules or functions of parameters. They merge where every call of one has the others beside it, on the
    same input, in each graph; and where they agree in dtype, device and in whether they train. In training, a layer
    without bias stays apart from those with one, since a zero that stands for it would learn. The merged layer lies
    beside the first as `q_k_v`; a state_dict with the former names still loads.

    It pays where a single layer is too small to fill the machine: few tokens, narrow layers, many cores or a GPU. It
    costs where what follows needs contiguous parts, since the parts are slices.
    """

    name: ClassVar[str] = "merge"
    promise: ClassVar[Promise] = Promise.CLOSE
    after: ClassVar[tuple[str, ...]] = ("clean",)
    for_speed: ClassVar[bool] = True

    include: str = field(default="*", metadata={"help": "glob over the layer's qualified name"})
    exclude: str = field(default="", metadata={"help": "glob over the layer's qualified name; wins over include"})

    def run(self, region: Region) -> Iterator[Change | Skip]:
        """Look at each value that several layers are applied to."""
        for node in list(region.graph.nodes):
            if not region.is_erased(node):
                yield from self._on(node, region)

    def _on(self, value: fx.Node, region: Region) -> Iterator[Change | Skip]:
        found = [layer for user in sorted(value.users) if (layer := self._layer(user, value, region)) is not None]
        if len(found) < 2:
            return
        alike: dict[tuple[Any, ...], list[Layer]] = defaultdict(list)
        for layer in found:
            if isinstance(layer, Skip):
                yield layer
            else:
                alike[layer.key(region.training)].append(layer)
        for layers in alike.values():
            if region.is_spared(layers[0].affine.node):
                continue
            if len(layers) > 1:
                yield _merge(layers, region)
            elif len(alike) > 1:
                other = next(other[0] for other in alike.values() if other is not layers)
                yield layers[0].skip(layers[0].why_apart(other, region), region)

    def _layer(self, node: fx.Node, value: fx.Node, region: Region) -> Layer | Skip | None:
        name = region.qualified(node)
        affine = read_affine(node, region)
        if affine is None or not fnmatchcase(name, self.include) or fnmatchcase(name, self.exclude):
            return None
        if isinstance(affine, Skip):
            given = node.args[0] if node.args else node.kwargs.get("input")
            module = region.submodule(node) if node.op == "call_module" else None
            linear = node.target is F.linear or isinstance(module, nn.Linear)
            return affine if linear and given is value else None
        if affine.kind != "linear" or affine.input is not value:
            return None
        return Layer.of(affine, region.program)


def _merge(layers: list[Layer], region: Region) -> Change | Skip:
    program, first = region.program, layers[0]
    names = [region.qualified(layer.affine.node) for layer in layers]
    for call in first.calls:
        where = program.region_of(call.node)
        calls = [layer.call_on(call.input).node for layer in layers]
        reason = next(filter(None, (_why_not_slice(node, where) for node in calls)), None)
        reason = reason or why_other_mode(min(calls), max(calls))
        writer = Effects(where).written_between(call.input, min(calls), max(calls))
        if writer is not None:
            reason = f"the input of the layers is written in place by {where.qualified(writer)!r} between them"
        if reason is not None:
            return first.skip(reason, region)
    change = Change(f"merged with {', '.join(map(repr, names[1:]))}", names[0], source_of(first.affine.node))
    own = [_name(layer.affine) for layer in layers]
    owner, _, leaf = own[0].rpartition(".")
    hint = "_".join([leaf, *(name.rpartition(".")[2] for name in own[1:])])
    merged = _merged([layer.affine for layer in layers])
    name = region.add_module(f"{owner}.{hint}" if owner else hint, merged)
    former = tuple(
        tuple(tuple(program.names(tensor)) if tensor is not None else () for tensor in (affine.weight, affine.bias))
        for affine in (layer.affine for layer in layers)
    )
    for call in first.calls:
        _split([layer.call_on(call.input) for layer in layers], name, program.region_of(call.node))
    for layer in layers:
        if layer.affine.module is not None:
            program.remove_module(layer.affine.module)
    hook = FormerParameters(tuple(program.paths(merged)), former, merged.bias is not None)
    # The public form of this hook keeps a reference to the module, which its own pickle can't follow.
    program.root._register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]
    return change


def _why_not_slice(node: fx.Node, region: Region) -> str | None:
    reason = why_noticed(node, region)
    return None if reason is None else f"the output of '{region.qualified(node)}' can't be a slice: {reason}"


def _name(affine: Affine) -> str:
    """The layer's own name, or that of its weight."""
    node = affine.node if affine.module is not None else affine.weight_node
    assert node is not None
    return str(node.target)


def _merged(layers: Sequence[Affine]) -> nn.Linear:
    first = layers[0].weight
    weight = torch.cat([layer.weight.detach() for layer in layers])
    merged = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    merged.weight = nn.Parameter(weight, requires_grad=first.requires_grad)
    biases = [layer.bias for layer in layers if layer.bias is not None]
    if biases:
        zeros = [first.new_zeros(layer.out_channels) if layer.bias is None else layer.bias for layer in layers]
        merged.bias = nn.Parameter(torch.cat(zeros).detach(), requires_grad=biases[0].requires_grad)
    return merged


def _split(calls: Sequence[Affine], name: str, region: Region) -> None:
    """Let one call of the merged layer stand for `calls`."""
    nodes, graph = [call.node for call in calls], region.graph
    with graph.inserting_before(min(nodes)):
        whole = inherit(graph.call_module(name, (calls[0].input,)), nodes[0])
        del whole.meta["tensor_meta"]
        parts = inherit(graph.call_method("split", (whole, [call.out_channels for call in calls]), {"dim": -1}), whole)
        each = [graph.call_function(operator.getitem, (parts, index)) for index in range(len(calls))]
    region.program.note(whole, region)
    for node, part in zip(nodes, each, strict=True):
        region.replace(node, part)
        hide_strides(part, region)
