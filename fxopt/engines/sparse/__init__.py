"""Linear layers with zeros in their weights: by sparse kernels where these are measured to be faster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.fx as fx

from fxopt.capture.state import state_kept
from fxopt.contract import Skip
from fxopt.engines.binding import bind
from fxopt.engines.contract import Built, Engine
from fxopt.engines.layer import Layer
from fxopt.engines.sparse.found import Found, zeros
from fxopt.engines.sparse.gate import layer_times, plans, run_times
from fxopt.engines.sparse.kernels import FIRST, KERNELS, Kernel
from fxopt.engines.sparse.linear import Indices, SparseLinearFunction, sparse_linear
from fxopt.engines.sparse.place import Placement
from fxopt.engines.sparse.semi_structured import LIBRARIES, is_two_of_four, semi_structured
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.rewriting import propagate_shapes

__all__ = ["Indices", "Sparse", "SparseLinearFunction", "sparse_linear"]

Made = dict[tuple[str, str], Kernel]
"""Kernels by the key of their layer and their name."""
_WORTH = 0.97
"""Share of torch's own time below which another way is taken: what is nearer is noise."""


@dataclass(frozen=True)
class Sparse(Engine):
    """Linear layers by the fastest of dense, CSR, block and smaller products, the rest by torch.

    Which it is, is measured for each layer while building; values stay with features first from one sparse layer to
    the next. Then the whole graph is held against the dense one, which runs where nothing beats it. All sizes that the
    guards of the capture allow can be run; the choice is for those of the example.

    On CUDA the products are dense, smaller, and those of sparse tensor cores for weights with 2 of each 4 at zero.
    """

    name: ClassVar[str] = "sparse"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    tune_seconds: float = field(default=2.0, metadata={"help": "about how long to try kernels"})
    bfloat16: bool = field(default=False, metadata={"help": "let dense layers run in bfloat16 too"})

    def build(self, module: GraphModule, inputs: Inputs, choices: Mapping[str, Any]) -> Built:
        """See `Engine.build`; shapes are written into the metadata of the module's nodes."""
        propagate_shapes(module, inputs)
        device = next((tensor.device.type for tensor in (*module.parameters(), *inputs.tensors)), "cpu")
        found = Found(module, device)
        built = self._built(module, device, found, inputs, choices)
        return replace(built, reasons=(*built.reasons, *_refusals(found, built.choices["kernels"])))

    def _built(
        self, module: GraphModule, device: str, found: Found, inputs: Inputs, choices: Mapping[str, Any]
    ) -> Built:
        made: Made = {}

        def assembled(kernels: Mapping[str, str], why: str = "") -> Built:
            return _assemble(module, device, {"kernels": kernels, "why": why}, made)

        if choices:
            return _assemble(module, device, choices, made)
        if not any(zeros(layer) for layer in found.named.values()):
            return assembled({}, "no linear layer has zeros in its weight")
        times = layer_times(found, () if self.bfloat16 else ("bfloat16",), self.tune_seconds)
        runs = {name: assembled(plan) for name, plan in plans(times).items()}
        runs["torch"] = assembled({})
        with state_kept(*(held for built in runs.values() for held in built.holds)):
            seconds = run_times({name: built.run for name, built in runs.items()}, inputs)
        best = min(seconds, key=seconds.__getitem__)
        if seconds[best] <= _WORTH * seconds["torch"]:
            return runs[best]
        return assembled({}, f"measured, the graph took {seconds[best] / seconds['torch']:.2f}x as long as torch's")

    def tolerance(self, dtype: torch.dtype) -> float:
        """That of bfloat16 where layers may run in it."""
        return super().tolerance(torch.bfloat16 if self.bfloat16 else dtype)


def _assemble(module: GraphModule, device: str, choices: Mapping[str, Any], made: Made) -> Built:
    """What was chosen, built with the kernels that are `made` and those that it adds to them."""
    found = Found(module, device)
    chosen: Mapping[str, str] = choices["kernels"]
    if not chosen:
        why = f"it runs as torch runs it: {choices['why']}"
        skips = [found.skip(layer, why) for layer in reversed(found.named.values())]
        return Built(bind(found.root), (*found.reasons[::-1], *skips), dict(choices), holds=(found.root,))
    for region in found.regions:
        layers: dict[fx.Node, Layer] = {}
        last: dict[fx.Node, Kernel] = {}
        first: dict[fx.Node, Kernel] = {}
        for key, layer in found.named.items():
            if found.region_of[layer.node] is region:
                name = chosen.get(key, "")
                layers[layer.node] = layer
                if (key, name) not in made:
                    made[key, name] = _kernel(name, layer, key)
                (first if name in FIRST else last)[layer.node] = made[key, name]
        Placement(region, layers, last, first).run()
    return Built(bind(found.root), tuple(found.reasons[::-1]), dict(choices), holds=(found.root,))


def _kernel(name: str, layer: Layer, key: str) -> Kernel:
    make = KERNELS.get(name)
    kernel = make(layer) if make is not None else None
    if kernel is None:
        raise EngineError(
            f"engine 'sparse': the choice '{name}' does not fit layer '{key}': the choices are those of other weights, "
            "or of another machine; lower it without them"
        )
    return kernel


def _refusals(found: Found, chosen: Mapping[str, str]) -> list[Skip]:
    """The layers on CUDA whose zeros are those of sparse tensor cores, which can't take them."""
    skips = []
    for key, layer in found.named.items():
        if chosen.get(key) in LIBRARIES or not layer.weight.is_cuda or not is_two_of_four(layer.weight):
            continue
        tried = [semi_structured(library, layer) for library in LIBRARIES]
        reasons = [reason for reason in tried if isinstance(reason, str)]
        if len(reasons) == len(tried):
            skips.append(found.skip(layer, "; ".join(dict.fromkeys(reasons))))
    return skips
