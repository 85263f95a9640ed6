"""Where a runtime wants values quantised besides the inputs of layers, so that its integer kernels fuse.

onnxruntime runs a convolution, an addition, a concatenation or a pooling on integers only where its inputs and its
output are quantised; linear layers, transformers' above all, are best left with quantised inputs alone, since
quantising their residual stream costs more accuracy than it gains time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.graph import Affine, Effects, Region, inherit, read_affine
from fxopt.modules import FakeQuantize, Fused
from passes.qat.insert import calls_fake_quantize, name_of_other_mode
from passes.qat.targets import PASSED_ON, PASSED_ON_MODULES, POOL_MODULES, POOLS, is_call_of

_JOINS: frozenset[Any] = frozenset(
    {*POOLS, operator.add, operator.iadd, torch.add, torch.cat, torch.concat, "add", "add_"}
)
_ACTIVATIONS: frozenset[Any] = frozenset(
    {F.relu, F.relu6, F.hardtanh, F.leaky_relu, F.silu, F.gelu, F.hardswish, torch.relu, torch.relu_, torch.sigmoid,
     torch.tanh, "relu", "relu_", "sigmoid", "tanh"}
)  # fmt: skip
_FOLDED = ("relu", "relu6")
_ACTIVATION_MODULES = (
    nn.ReLU,
    nn.ReLU6,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Sigmoid,
    nn.Tanh,
)


def quantize_outputs(region: Region, wanted: Callable[[fx.Node], bool], make: Callable[[], FakeQuantize]) -> int:
    """Quantise the outputs of convolutions, and of what joins quantised values; how many that were.

    What leads to an output of the graph with no layer between stays a float.
    """
    ahead, effects, end = _with_layers_ahead(region), Effects(region), region.graph.output_node()
    quantised: dict[fx.Node, fx.Node] = {}  # a value, and the call of its quantiser
    count = 0
    for node in list(region.graph.nodes):
        if node not in ahead:
            continue
        if is_call_of(node, region, PASSED_ON, PASSED_ON_MODULES):
            source = node.all_input_nodes[0]
            # What reads it behind a write would read the values of before.
            if calls_fake_quantize(source, region) and effects.written_between(node, node, end) is None:
                quantised[node] = _after(node, region, str(source.target))
            continue
        if not wanted(node):
            continue
        affine = read_affine(node, region)
        if isinstance(affine, Affine) and affine.kind != "linear":
            if isinstance(affine.module, Fused) and _has_float_tail(affine.module):
                inner = make().train(affine.module.training)
                region.program.replace_module(affine.module, Fused.of(affine.module, inner_fake_quant=inner))
                count += 1
        elif not (
            is_call_of(node, region, _JOINS, POOL_MODULES)
            and all(calls_fake_quantize(source, region) for source in node.all_input_nodes)
        ):
            continue
        last = _activated(node, region)
        if last in quantised or last not in ahead:
            continue
        hint = f"output_fake_quant.{region.qualified(last).replace('.', '_')}"
        quantised[last] = _after(last, region, name_of_other_mode(hint, region) or region.add_module(hint, make()))
        count += 1
    return count


def _has_float_tail(module: Fused) -> bool:
    """Whether what follows the convolution is an operator of its own to the runtime, which folds only clipping."""
    return module.adds or (module.activation is not None and module.activation.name not in _FOLDED)


def edge_layers(region: Region) -> frozenset[fx.Node]:
    """The layers that no other layer comes before, and those that none comes behind."""
    layers = [node for node in region.graph.nodes if isinstance(read_affine(node, region), Affine)]
    ahead = _with_layers_ahead(region)
    behind: set[fx.Node] = set()
    for node in region.graph.nodes:
        if any(source in behind or source in layers for source in node.all_input_nodes):
            behind.add(node)
    return frozenset(node for node in layers if node not in ahead or node not in behind)


def _with_layers_ahead(region: Region) -> set[fx.Node]:
    """The nodes whose value some layer reads, maybe by way of others."""
    ahead: set[fx.Node] = set()
    for node in reversed(region.graph.nodes):
        if any(user in ahead or isinstance(read_affine(user, region), Affine) for user in node.users):
            ahead.add(node)
    return ahead


def _activated(node: fx.Node, region: Region) -> fx.Node:
    """The activation behind `node`, where that is all that reads it; else `node`."""
    users = list(node.users)
    return users[0] if len(users) == 1 and is_call_of(users[0], region, _ACTIVATIONS, _ACTIVATION_MODULES) else node


def _after(node: fx.Node, region: Region, name: str) -> fx.Node:
    """Let all that reads `node` read it through the quantiser `name`, and return the call."""
    with region.graph.inserting_after(node):
        call = region.graph.call_module(name, (node,))
    region.program.note(call, region)
    inherit(call, node)
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
    return call
