"""Places the quantisers: on weights, on the inputs of layers, and where a target wants them besides."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.fx as fx
from torch import nn

from fxopt.contract import Change, Skip
from fxopt.graph import Affine, GraphModule, Program, Region, read_affine, source_of
from fxopt.modules import FakeQuantize, Fused
from passes.qat.insert import Activations, calls_fake_quantize, quantize_parameter, quantize_weight
from passes.qat.placement import edge_layers, quantize_outputs
from passes.qat.products import Factor, factors, why_parameter_float
from passes.qat.scheme import Scheme
from passes.qat.tables import added_table
from passes.qat.targets import (
    POOL_MODULES,
    Target,
    before_what_passes_on,
    is_pooling,
    rounds_biases,
    takes_tables,
    why_float,
    why_input_float,
    why_layer_float,
    why_product_float,
    why_recurrent_float,
)
from passes.qat.whole import is_whole, quantized_form

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear)


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
    spared = region.program.spared

    def asked(name: str) -> bool:
        return named(name) and name not in spared

    if target == "onnxruntime" and scheme.activation_bits is not None:
        like = next(region.module.parameters(), torch.empty(0))
        chosen = {node for node in region.graph.nodes if node not in kept and asked(region.qualified(node))}
        count = quantize_outputs(region, chosen.__contains__, lambda: scheme.for_value(like))
        if count:
            yield Change(f"{count} outputs of convolutions, additions and poolings fake-quantised", region.path)
    placing = _Placing(region, scheme, target, asked)
    for node in list(region.graph.nodes):
        if node in kept:
            name = region.qualified(node)
            yield Skip(name, "a first or last layer stays a float, as first_last=keep asks", source_of(node))
        else:
            yield from placing.at(node)


class _Placing:
    """Puts quantisers around one node after the other."""

    def __init__(self, region: Region, scheme: Scheme, target: Target, named: Callable[[str], bool]):
        self._region = region
        self._scheme = scheme
        self._target = target
        self._named = named
        self._activations = Activations(region, scheme.for_value)

    def at(self, node: fx.Node) -> Iterator[Change | Skip]:
        """Quantise what `node` multiplies, and say what stays a float."""
        region, name = self._region, self._region.qualified(node)
        if node.op == "call_module" and is_whole(region.submodule(node)):
            yield from self._whole(node)
        if not self._named(name):
            return
        layer = read_affine(node, region, masked=True)
        if isinstance(layer, Affine) and (why := why_layer_float(layer.kind, self._target)):
            yield Skip(name, why, source_of(node))
        elif isinstance(layer, Affine):
            yield from self._layer(layer)
        elif (found := factors(node, region)) and (layer is None or any(each.read for each in found)):
            yield from self._product(node, found)
        elif layer is not None:
            yield layer
            return
        elif takes_tables(self._target) and (table := added_table(node, region)):
            quantize_parameter(table[0], node, table[1], self._scheme.for_weight, region)
            yield Change(self._scheme.what(True, False), name, source_of(node))
        elif is_pooling(node, region, self._target) and self._quantize(node, node.all_input_nodes[0], 0, "input", name):
            yield Change(self._scheme.what(False, True), name, source_of(node))
        reason = (
            why_float(node, region, self._target)
            or _why_out_of_reach(node, region)
            or why_parameter_float(node, region)
        )
        if reason:
            yield Skip(name, reason, source_of(node))

    def _layer(self, layer: Affine) -> Iterator[Change | Skip]:
        node = layer.node
        weight = quantize_weight(layer, self._scheme.for_weight, self._region)
        hint = str((node if layer.weight_node is None else layer.weight_node).target)
        reason = why_input_float(layer, self._target)
        if reason:
            yield Skip(self._region.qualified(node), reason, source_of(node))
        value = not reason and self._quantize(node, layer.input, 0, "input", hint)
        if rounds_biases(self._target):
            self._note_reader(node)
        if weight or value:
            yield Change(self._scheme.what(weight, value), self._region.qualified(node), source_of(node))

    def _note_reader(self, node: fx.Node) -> None:
        """Tell a convolution whose integers it reads, since its bias is rounded to steps of both scales."""
        module = self._region.submodule(node) if node.op == "call_module" else None
        if not isinstance(module, Fused) or not isinstance(module, nn.modules.conv._ConvNd):
            return
        if isinstance(module, nn.modules.conv._ConvTransposeNd) and module.groups > 1:
            return  # it has a scale for each output of a group, and stays a float
        source = node.all_input_nodes[0]
        fake = self._region.submodule(source) if calls_fake_quantize(source, self._region) else None
        if isinstance(fake, FakeQuantize) and fake not in module.reads:
            module.reads = (*module.reads, fake)

    def _product(self, node: fx.Node, found: tuple[Factor, ...]) -> Iterator[Change | Skip]:
        name, weight, value = self._region.qualified(node), False, False
        reason = why_product_float(node, self._target)
        if reason and not any(each.read for each in found):
            yield Skip(name, reason, source_of(node))
            return
        for each in found:
            if each.read is not None and each.reader is not None:
                quantize_parameter(each.read, each.reader, each.axis, self._scheme.for_weight, self._region)
                weight = True
            else:
                value |= self._quantize(node, each.node, each.index, each.name, name)
        if weight or value:
            yield Change(self._scheme.what(weight, value), name, source_of(node))

    def _whole(self, node: fx.Node) -> Iterator[Change | Skip]:
        """A module that is called as one; the graph shows the inputs of recurrent layers alone."""
        module, name, source = self._region.submodule(node), self._region.qualified(node), source_of(node)
        names = ("query", "key", "value")
        values = [node.args[index] if len(node.args) > index else node.kwargs.get(n) for index, n in enumerate(names)]
        inputs = tuple(name for index, name in enumerate(names) if values[index] not in values[:index])
        form, found = quantized_form(module, name, self._scheme, self._named, inputs, source)
        if form is not module:
            self._region.program.replace_module(module, form)
        yield from found
        if isinstance(form, (nn.RNNBase, nn.RNNCellBase)) and form is not module and isinstance(values[0], fx.Node):
            reason = why_recurrent_float(self._target) or _why_no_tensor(values[0])
            if reason:
                yield Skip(name, reason, source)
            elif self._quantize(node, values[0], 0, "input", name):
                yield Change(self._scheme.what(False, True), name, source)

    def _quantize(self, node: fx.Node, value: fx.Node, index: int, name: str, hint: str) -> bool:
        if self._scheme.activation_bits is None:
            return False
        reader, value_before = before_what_passes_on(node, value, self._region, self._target)
        if reader is not node:
            index, name = 0, "input"
        like = next(self._region.program.root.parameters(), torch.empty(0))
        return self._activations.quantize(reader, value_before, index, name, like, hint)


def layer_names(module: GraphModule) -> list[str]:
    """Qualified names of what may be quantised: layers, and calls of functions."""
    layers = (*_LAYERS, nn.Embedding, nn.EmbeddingBag, *POOL_MODULES)
    names = [name for name, child in module.named_modules() if isinstance(child, layers)]
    for region in Program(module).regions:
        for node in region.graph.nodes:
            if node.op in ("call_function", "call_method") and node.users:  # a guard has none
                names.append(region.qualified(node))
    return names


def waiting(module: nn.Module) -> list[str]:
    """Names of the quantisers that have no range yet."""
    return [name for name, child in module.named_modules() if isinstance(child, FakeQuantize) and not child.ready]


def _why_no_tensor(value: fx.Node) -> str:
    """Why what a recurrent layer reads can't be rounded; "" where it can."""
    return "" if "tensor_meta" in value.meta else "its input is no tensor but a packed sequence: it stays a float"


def _why_out_of_reach(node: fx.Node, region: Region) -> str | None:
    """Why the layers inside of a module that is called as one are not quantised; None where there are none."""
    if node.op != "call_module" or is_whole(region.submodule(node)):
        return None
    inside = list(region.submodule(node).modules())
    if any(isinstance(child, (GraphModule, Fused)) for child in inside):
        return None
    count = sum(isinstance(child, _LAYERS) for child in inside)
    kind = type(inside[0]).__name__
    return f"{kind} is called as one: what it multiplies inside is out of reach" if count else None
