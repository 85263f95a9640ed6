"""Places the quantisers: on weights, on the inputs of layers, and where a target wants them besides."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
import torch.fx as fx
from torch import nn

from fxopt.contract import Change, Skip
from fxopt.graph import Affine, GraphModule, Region, read_affine, source_of
from fxopt.modules import FakeQuantize
from passes.qat.insert import Activations, quantize_weight
from passes.qat.placement import edge_layers, quantize_outputs
from passes.qat.scheme import Scheme

Target = Literal["generic", "onnxruntime", "openvino", "inductor"]
TARGETS = get_args(Target)
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)


def place(
    region: Region, scheme: Scheme, target: Target, keep_edges: bool, named: Callable[[str], bool]
) -> Iterator[Change | Skip]:
    """Quantise the weight and the input of each layer, and what the target wants besides.

    Args:
        region: where to.
        scheme: with what.
        target: the runtime that is to take it.
        keep_edges: whether the first and the last layers stay floats.
        named: whether a qualified name is among those asked for.
    """
    kept = edge_layers(region) if keep_edges else frozenset()
    wanted = [node for node in region.graph.nodes if named(region.qualified(node))]
    if target == "onnxruntime" and scheme.activation_bits is not None:
        like = next(region.module.parameters(), torch.empty(0))
        chosen = set(wanted) - kept
        count = quantize_outputs(region, chosen.__contains__, lambda: scheme.for_value(like))
        if count:
            yield Change(f"{count} outputs of convolutions, additions and poolings fake-quantised", region.path)
    activations = Activations(region, scheme.for_value)
    for node in wanted:
        name, layer = region.qualified(node), read_affine(node, region)
        if node in kept:
            yield Skip(name, "a first or last layer stays a float, as first_last=keep asks", source_of(node))
        elif isinstance(layer, Affine):
            weight = quantize_weight(layer, scheme.for_weight, region)
            value = scheme.activation_bits is not None and activations.quantize(layer)
            if weight or value:
                yield Change(scheme.what(weight, value), name, source_of(node))
        elif layer is not None:
            yield layer
        elif (reason := _why_out_of_reach(node, region)) is not None:
            yield Skip(name, reason, source_of(node))


def waiting(module: nn.Module) -> list[str]:
    """Names of the quantisers that have no range yet."""
    return [name for name, child in module.named_modules() if isinstance(child, FakeQuantize) and not child.ready]


def _why_out_of_reach(node: fx.Node, region: Region) -> str | None:
    """Why the layers inside of a module that is called as one are not quantised; None where there are none."""
    if node.op != "call_module":
        return None
    inside = list(region.submodule(node).modules())
    if any(isinstance(child, GraphModule) for child in inside):
        return None
    count = sum(isinstance(child, _LAYERS) for child in inside)
    kind = type(inside[0]).__name__
    return f"{kind} is called as one: what it multiplies inside is out of reach" if count else None
