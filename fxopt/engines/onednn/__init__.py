"""oneDNN's own kernels, called from the graph: weights packed once, activations and additions as post-ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
import torch.fx as fx
from torch import nn

from fxopt.capture.independent import same_tensors_copy
from fxopt.contract import Skip
from fxopt.engines.binding import bind, named
from fxopt.engines.contract import Built, Engine, Run
from fxopt.engines.onednn.kernels import KERNELS
from fxopt.engines.onednn.layer import Layer, read_layer
from fxopt.engines.onednn.strides import hide, why_noticed
from fxopt.engines.onednn.tune import choose, fastest
from fxopt.errors import EngineError
from fxopt.graph import GraphModule, Program, Region, source_of
from fxopt.inputs import Inputs
from fxopt.rewriting import propagate_shapes

_CHANNELS_LAST, _AS_GIVEN = "channels_last", "as given"
_ROUNDS = 5
_WHOLE_SECONDS = 0.3
"""Time for holding the whole graph against torch's, beside the first calls."""


@dataclass(frozen=True)
class OneDNN(Engine):
    """Convolutions and linear layers by oneDNN's fused operators, the rest by torch; nothing is compiled.

    Which kernel computes each layer, and whether the graph runs in channels_last, is measured while building, and
    held against the graph as torch runs it. All sizes that the guards of the capture allow can be run; the choice is
    for those of the example.
    """

    name: ClassVar[str] = "onednn"

    tune_seconds: float = field(default=1.0, metadata={"help": "about how long to try kernels; 0 packs every layer"})

    def unavailable(self) -> str | None:
        """torch may be built without oneDNN."""
        if torch.backends.mkldnn.is_available():
            return None
        return "this torch has no oneDNN; `pip install torch` for x86-64 or Arm brings one that has"

    def build(self, module: GraphModule, inputs: Inputs, choices: Mapping[str, Any]) -> Built:
        """See `Engine.build`; shapes are written into the metadata of the module's nodes."""
        propagate_shapes(module, inputs)
        if choices:
            return _assemble(module, choices)
        found = _Found(module)
        layers = found.layers
        names = choose(layers, self.tune_seconds) if self.tune_seconds else ["packed"] * len(layers)
        kernels = {found.key(layer): name for layer, name in zip(layers, names, strict=True)}
        why = next(filter(None, map(why_noticed, found.regions)), "")
        if why or not any(layer.spatial for layer in layers):
            return _assemble(module, {"layout": _AS_GIVEN, "why": why, "kernels": kernels})
        ours = _assemble(module, {"layout": _CHANNELS_LAST, "why": "", "kernels": kernels})
        if not self.tune_seconds:
            return ours
        given = _assemble(module, {"layout": _AS_GIVEN, "why": "", "kernels": kernels})
        times = _time({_AS_GIVEN: given.run, _CHANNELS_LAST: ours.run}, inputs)
        if times[_CHANNELS_LAST] <= times[_AS_GIVEN]:
            return ours
        why = f"packed, the graph took {times[_CHANNELS_LAST] / times[_AS_GIVEN]:.2f}x as long"
        return _assemble(module, {"layout": _AS_GIVEN, "why": why, "kernels": kernels})


class _Found:
    """The layers of a module, in a copy whose graphs may be used up."""

    def __init__(self, module: GraphModule):
        self.root = cast(GraphModule, same_tensors_copy(module))
        self.regions = [region for region in Program(self.root).regions if region.mode is not True]
        self.layers: list[Layer] = []
        self.reasons: list[Skip] = []
        self.region_of: dict[fx.Node, Region] = {}
        for region in self.regions:
            self._read(region)

    def key(self, layer: Layer) -> str:
        """What a choice calls a layer."""
        path = self.region_of[layer.node].path
        return f"{path}.{layer.node.name}" if path else layer.node.name

    def _read(self, region: Region) -> None:
        taken: set[fx.Node] = set()
        # Of two layers that meet in an addition the later one takes it.
        for node in reversed(region.graph.nodes):
            layer = read_layer(node, region, taken)
            if isinstance(layer, Layer):
                taken.add(layer.last)
                self.layers.append(layer)
                self.region_of[node] = region
            elif layer is not None:
                self.reasons.append(layer)
            elif node.op == "call_module" and isinstance(region.submodule(node), nn.modules.batchnorm._BatchNorm):
                why = "it is a batch norm of its own; the pass 'fuse' folds it where that is safe"
                self.reasons.append(Skip(region.qualified(node), why, source_of(node)))


def _assemble(module: GraphModule, choices: Mapping[str, Any]) -> Built:
    """What was chosen, built."""
    found = _Found(module)
    reasons = found.reasons[::-1]
    channels_last = choices["layout"] == _CHANNELS_LAST
    if channels_last:
        for region in found.regions:
            hide(region)
    values: dict[fx.Node, fx.Node] = {}
    for layer in reversed(found.layers):
        key, region = found.key(layer), found.region_of[layer.node]
        if layer.spatial and not channels_last:
            why = choices.get("why", "")
            reasons.append(
                Skip(region.qualified(layer.node), f"it runs as torch runs it: {why}", source_of(layer.node))
            )
            continue
        make = KERNELS.get(choices["kernels"].get(key, ""))
        kernel = make(layer) if make is not None else None
        if kernel is None:
            raise EngineError(
                f"engine 'onednn': there is no choice that fits layer '{key}': the choices are those of another "
                "module, or of another machine; lower it without them"
            )
        _put(layer, kernel, values)
    return Built(bind(found.root), tuple(reasons), dict(choices))


def _put(layer: Layer, kernel: Callable[..., torch.Tensor], values: dict[fx.Node, fx.Node]) -> None:
    """Call `kernel` in place of the nodes of a layer; `values` tells what stands for nodes that went that way."""
    graph = layer.node.graph
    args = [layer.input] if layer.other is None else [layer.input, layer.other]
    with graph.inserting_before(layer.last):
        call = graph.call_function(named(kernel, layer.node.name), tuple(values.get(arg, arg) for arg in args))
    values[layer.last] = call
    layer.last.replace_all_uses_with(call)
    graph.erase_node(layer.last)
    if layer.node is not layer.last:
        graph.erase_node(layer.node)


def _time(runs: Mapping[str, Run], inputs: Inputs) -> dict[str, float]:
    def caller(run: Run) -> Callable[[], object]:
        given = inputs.map(lambda tensor: tensor.detach().clone())
        return lambda: run(*given.args, **given.kwargs)

    return fastest({name: caller(run) for name, run in runs.items()}, _ROUNDS, _WHOLE_SECONDS)
