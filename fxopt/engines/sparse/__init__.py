"""Linear layers with zeros in their weights: by sparse kernels where these are measured to be faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.fx as fx

from fxopt.engines.binding import bind
from fxopt.engines.contract import Built, Engine, Run
from fxopt.engines.layer import Layer
from fxopt.engines.layers import Layers
from fxopt.engines.sparse.kernels import FIRST, LAST, Kernel, Make
from fxopt.engines.sparse.layout import to_features_first, to_features_last
from fxopt.engines.sparse.linear import Indices, SparseLinearFunction, sparse_linear
from fxopt.engines.sparse.place import Placement, written_values
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.rewriting import propagate_shapes

__all__ = ["Indices", "Sparse", "SparseLinearFunction", "sparse_linear"]

_ROUNDS = 15
_LAYER_SECONDS, _WHOLE_SECONDS = 0.2, 1.0
_WORTH = 0.97
"""Share of torch's own time below which another way is taken: what is nearer is noise."""


@dataclass(frozen=True)
class Sparse(Engine):
    """Linear layers by the fastest of dense, CSR, block and smaller products, the rest by torch.

    Which it is, is measured for each layer while building; values stay with features first from one sparse layer to
    the next. Then the whole graph is held against the dense one, which runs where nothing beats it. All sizes that the
    guards of the capture allow can be run; the choice is for those of the example.
    """

    name: ClassVar[str] = "sparse"

    tune_seconds: float = field(default=2.0, metadata={"help": "about how long to try kernels"})
    bfloat16: bool = field(default=False, metadata={"help": "let dense layers run in bfloat16 too"})

    def unavailable(self) -> str | None:
        """The sparse kernels are MKL's."""
        if torch.backends.mkl.is_available():
            return None
        return "this torch has no MKL, whose sparse products it needs; `pip install torch` for x86-64 brings one"

    def build(self, module: GraphModule, inputs: Inputs, choices: Mapping[str, Any]) -> Built:
        """See `Engine.build`; shapes are written into the metadata of the module's nodes."""
        propagate_shapes(module, inputs)
        if choices:
            return _assemble(module, choices)
        found = _Found(module)
        if not any(_zeros(layer) for layer in found.named.values()):
            return _assemble(module, {"kernels": {}, "why": "no linear layer has zeros in its weight"})
        times = self._measure(found)
        plans = {
            "dense": {key: _least(each, LAST) for key, each in times.items()},
            # What a region of sparse layers costs, and what one alone does that pays for both of its borders.
            "within": {key: _least(each, {**LAST, **FIRST}) for key, each in times.items()},
            "alone": {key: _least(_with_borders(each), {**LAST, **FIRST}) for key, each in times.items()},
        }
        runs = {name: _assemble(module, {"kernels": plan, "why": ""}) for name, plan in plans.items()}
        runs["torch"] = _assemble(module, {"kernels": {}, "why": ""})
        seconds = _time({name: built.run for name, built in runs.items()}, inputs)
        best = min(seconds, key=seconds.__getitem__)
        if seconds[best] <= _WORTH * seconds["torch"]:
            return runs[best]
        why = f"measured, the graph took {seconds[best] / seconds['torch']:.2f}x as long as torch's"
        return _assemble(module, {"kernels": {}, "why": why})

    def tolerance(self, dtype: torch.dtype) -> float:
        """That of bfloat16 where layers may run in it."""
        return super().tolerance(torch.bfloat16 if self.bfloat16 else dtype)

    def _measure(self, found: _Found) -> dict[str, dict[str, float]]:
        known: dict[Any, dict[str, float]] = {}
        result = {}
        began = time.perf_counter()
        for key, layer in sorted(found.named.items(), key=lambda item: -item[1].weight.numel()):
            signature = (layer.signature, round(20 * _zeros(layer)), key in found.stays_last)
            if signature not in known:
                late = time.perf_counter() - began > self.tune_seconds
                tables = (LAST,) if key in found.stays_last else (LAST, FIRST)
                with torch.random.fork_rng(devices=[]):
                    known[signature] = {"dense": 0.0} if late else self._times(layer, tables)
            result[key] = known[signature]
        return result

    def _times(self, layer: Layer, tables: Sequence[Mapping[str, Make]]) -> dict[str, float]:
        x = torch.randn(layer.shape).to(layer.weight.dtype)
        shape = (*layer.shape[:-1], layer.weight.shape[0])
        given = (x,) if layer.other is None else (x, torch.randn(shape).to(layer.weight.dtype))
        calls: dict[str, Callable[[], object]] = {}
        for table in tables:
            arguments = given if table is LAST else tuple(map(to_features_first, given))
            for name, make in table.items():
                kernel = None if name == "bfloat16" and not self.bfloat16 else make(layer)
                if kernel is not None:
                    calls[name] = lambda kernel=kernel, arguments=arguments: kernel(*arguments)  # type: ignore[misc]
        out = to_features_first(torch.randn(shape).to(layer.weight.dtype))
        calls["borders"] = lambda: (to_features_first(x), to_features_last(out, x))
        return _shortest(calls, _LAYER_SECONDS)


class _Found(Layers):
    """The linear layers of a module, by name, and which of them cannot have features first."""

    def __init__(self, module: GraphModule):
        super().__init__(module, _supported)
        written = {region: written_values(region) for region in self.regions}
        self.named: dict[str, Layer] = {}
        self.stays_last: set[str] = set()
        for layer in self.layers:
            if layer.kind != "linear":
                continue
            key, others = self.key(layer), {layer.input, layer.last, layer.other}
            self.named[key] = layer
            if _broadcasts(layer) or not written[self.region_of[layer.node]].isdisjoint(others):
                self.stays_last.add(key)


def _supported(dtype: torch.dtype) -> str | None:
    return None if dtype is torch.float32 else f"it is {dtype}, the sparse products are those of torch.float32"


def _broadcasts(layer: Layer) -> bool:
    """Whether what is added has another shape than the output, or another dtype."""
    if layer.other is None:
        return False
    meta = layer.other.meta.get("tensor_meta")
    outputs = torch.Size((*layer.shape[:-1], layer.weight.shape[0]))
    return meta is None or meta.shape != outputs or meta.dtype is not layer.weight.dtype


def _zeros(layer: Layer) -> float:
    return 1 - float(layer.weight.count_nonzero()) / layer.weight.numel()


def _least(times: Mapping[str, float], among: Mapping[str, Any]) -> str:
    return min((name for name in times if name in among), key=times.__getitem__)


def _with_borders(times: Mapping[str, float]) -> dict[str, float]:
    borders = times.get("borders", 0.0)
    return {name: seconds + (borders if name in FIRST else 0.0) for name, seconds in times.items()}


def _assemble(module: GraphModule, choices: Mapping[str, Any]) -> Built:
    """What was chosen, built."""
    found = _Found(module)
    chosen: Mapping[str, str] = choices["kernels"]
    if not chosen:
        why = f"it runs as torch runs it: {choices['why']}"
        skips = [found.skip(layer, why) for layer in reversed(found.named.values())]
        return Built(bind(found.root), (*found.reasons[::-1], *skips), dict(choices))
    for region in found.regions:
        layers: dict[fx.Node, Layer] = {}
        last: dict[fx.Node, Kernel] = {}
        first: dict[fx.Node, Kernel] = {}
        for key, layer in found.named.items():
            if found.region_of[layer.node] is region:
                name = chosen.get(key, "")
                layers[layer.node] = layer
                (first if name in FIRST else last)[layer.node] = _kernel(name, layer, key)
        Placement(region, layers, last, first).run()
    return Built(bind(found.root), tuple(found.reasons[::-1]), dict(choices))


def _kernel(name: str, layer: Layer, key: str) -> Kernel:
    make = {**LAST, **FIRST}.get(name)
    kernel = make(layer) if make is not None else None
    if kernel is None:
        raise EngineError(
            f"engine 'sparse': the choice '{name}' does not fit layer '{key}': the choices are those of other weights, "
            "or of another machine; lower it without them"
        )
    return kernel


def _time(runs: Mapping[str, Run], inputs: Inputs) -> dict[str, float]:
    def caller(run: Run) -> Callable[[], object]:
        given = inputs.map(lambda tensor: tensor.detach().clone())
        return lambda: run(*given.args, **given.kwargs)

    return _shortest({name: caller(run) for name, run in runs.items()}, _WHOLE_SECONDS)


def _shortest(calls: Mapping[str, Callable[[], object]], budget_seconds: float) -> dict[str, float]:
    """The shortest time of each in seconds, taken in turns: three rounds at least, since one may be disturbed."""
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    began = time.perf_counter()
    for number in range(_ROUNDS):
        if number >= 3 and time.perf_counter() - began > budget_seconds:
            break
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best
