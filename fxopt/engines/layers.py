"""The layers of a whole module, found in a copy of it, and what computes them put in their place."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.fx as fx
from torch import nn

from fxopt.capture.independent import same_tensors_copy
from fxopt.contract import Skip
from fxopt.engines.binding import named
from fxopt.engines.layer import Layer, Supported, read_layer
from fxopt.engines.strides import why_noticed
from fxopt.graph import GraphModule, Program, Region, source_of


class Layers:
    """The layers of a module in evaluation mode whose nodes have shapes in their metadata.

    Args:
        module: it is not changed.
        supported: why an engine has no kernels for a dtype, or None where it has.

    Attributes:
        root: a copy over the same tensors, whose graphs may be used up.
        regions: its graphs for evaluation.
        layers: of all graphs, from the outputs to the inputs of each.
        reasons: what looks like a layer and can't be taken.
    """

    def __init__(self, module: GraphModule, supported: Supported):
        self.root = cast(GraphModule, same_tensors_copy(module))
        self.regions = [region for region in Program(self.root).regions if region.mode is not True]
        self.layers: list[Layer] = []
        self.reasons: list[Skip] = []
        self.region_of: dict[fx.Node, Region] = {}
        self._values: dict[fx.Node, fx.Node] = {}
        for region in self.regions:
            self._read(region, supported)

    def key(self, layer: Layer) -> str:
        """What a choice calls a layer."""
        path = self.region_of[layer.node].path
        return f"{path}.{layer.node.name}" if path else layer.node.name

    def noticed(self) -> dict[Layer, str]:
        """The layers whose outputs must keep their strides, and why; asked before anything is put."""
        found: dict[Layer, str] = {}
        for region in self.regions:
            lasts = {layer.last: layer for layer in self.layers if self.region_of[layer.node] is region}
            found |= {lasts[value]: reason for value, reason in why_noticed(region, lasts.keys()).items()}
        return found

    def skip(self, layer: Layer, reason: str) -> Skip:
        """A `Skip` at a layer."""
        return Skip(self.region_of[layer.node].qualified(layer.node), reason, source_of(layer.node))

    def put(self, layer: Layer, kernel: Callable[..., torch.Tensor]) -> None:
        """Call `kernel` in place of the nodes of a layer: with its input, and with what it adds."""
        graph = layer.node.graph
        args = [layer.input] if layer.other is None else [layer.input, layer.other]
        with graph.inserting_before(layer.last):
            # An argument may itself be a layer that was put already.
            given = tuple(self._values.get(arg, arg) for arg in args)
            call = graph.call_function(named(kernel, layer.node.name), given)
        self._values[layer.last] = call
        layer.last.replace_all_uses_with(call)
        graph.erase_node(layer.last)
        if layer.node is not layer.last:
            graph.erase_node(layer.node)

    def _read(self, region: Region, supported: Supported) -> None:
        taken: set[fx.Node] = set()
        # Of two layers that meet in an addition the later one takes it.
        for node in reversed(region.graph.nodes):
            layer = read_layer(node, region, supported, taken)
            if isinstance(layer, Layer):
                taken.add(layer.last)
                self.layers.append(layer)
                self.region_of[node] = region
            elif layer is not None:
                self.reasons.append(layer)
            elif node.op == "call_module" and isinstance(region.submodule(node), nn.modules.batchnorm._BatchNorm):
                why = "it is a batch norm of its own; the pass 'fuse' folds it where that is safe"
                self.reasons.append(Skip(region.qualified(node), why, source_of(node)))
