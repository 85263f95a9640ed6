"""oneDNN's own kernels, called from the graph: weights packed once, activations and additions as post-ops."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from fxopt.capture.state import state_kept
from fxopt.engines.binding import bind
from fxopt.engines.contract import Built, Engine, Run
from fxopt.engines.layer import Layer
from fxopt.engines.layers import Layers
from fxopt.engines.memory import hand_back
from fxopt.engines.onednn.kernels import KERNELS, Kernel, places
from fxopt.engines.onednn.tune import choose
from fxopt.engines.shortest import caller
from fxopt.engines.strides import hide
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.rewriting import propagate_shapes

_CHANNELS_LAST, _AS_GIVEN = "channels_last", "as given"
_DTYPES: Mapping[torch.dtype, Callable[[], bool]] = {
    torch.float32: lambda: True,
    torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
    torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
}
_CALLS = 3
"""Of one layout in a row, twice."""
_WHOLE_SECONDS = 0.3
"""Time for holding the whole graph against torch's; one call of each is made even if it takes longer."""
_MANY_PRODUCTS = 10**11
"""A graph that multiplies more often, which takes about a second, is held against torch's on a part of its batch."""
_LARGE_BYTES = 1 << 20
"""Weights from which on the memory that packing one leaves behind is handed back at once, which takes a millisecond."""


@dataclass(frozen=True)
class OneDNN(Engine):
    """Convolutions and linear layers by oneDNN's fused operators, the rest by torch; nothing is compiled.

    Which kernel computes each layer, and whether the graph runs in channels_last, is measured while building, and
    held against the graph as torch runs it. All sizes that the guards of the capture allow can be run; the choice is
    for those of the example.
    """

    name: ClassVar[str] = "onednn"

    tune_seconds: float = field(default=0.5, metadata={"help": "about how long to try kernels; 0 packs every layer"})

    def unavailable(self) -> str | None:
        """torch may be built without oneDNN."""
        if torch.backends.mkldnn.is_available():
            return None
        return "this torch has no oneDNN; `pip install torch` for x86-64 or Arm brings one that has"

    def in_vain(self, module: GraphModule) -> str | None:
        """Weights of fewer bits that it has no kernels for: torch's own are slower than those for float32."""
        narrow = {parameter.dtype for parameter in module.parameters()} & {torch.bfloat16, torch.float16}
        return next((reason for reason in map(_supported, narrow) if reason), None)

    def build(self, module: GraphModule, inputs: Inputs, choices: Mapping[str, Any]) -> Built:
        """See `Engine.build`; shapes are written into the metadata of the module's nodes."""
        propagate_shapes(module, inputs)
        hand_back()
        made: dict[str, Kernel] = {}
        if choices:
            return _assemble(module, choices, made)
        found = Layers(module, _supported)
        noticed = found.noticed()
        layers = [layer for layer in found.layers if not (layer.spatial and layer in noticed)]
        names = choose(layers, self.tune_seconds) if self.tune_seconds else ["packed"] * len(layers)
        hand_back()
        kernels = {found.key(layer): name for layer, name in zip(layers, names, strict=True)}

        def assembled(layout: str, why: str = "") -> Built:
            return _assemble(module, {"layout": layout, "why": why, "kernels": kernels}, made)

        if not any(layer.spatial for layer in layers):
            return assembled(_AS_GIVEN)
        ours = assembled(_CHANNELS_LAST)
        if not self.tune_seconds:
            return ours
        given = assembled(_AS_GIVEN)
        products = sum(layer.weight.numel() * places(layer) for layer in layers)
        with state_kept(*ours.holds):
            times = _time_shortly({_AS_GIVEN: given.run, _CHANNELS_LAST: ours.run}, inputs, products)
        if times[_CHANNELS_LAST] <= times[_AS_GIVEN]:
            return ours
        ratio = times[_CHANNELS_LAST] / times[_AS_GIVEN]
        return assembled(_AS_GIVEN, f"packed, the graph took {ratio:.2f}x as long")


def _supported(dtype: torch.dtype) -> str | None:
    supported = _DTYPES.get(dtype)
    return None if supported is not None and supported() else f"oneDNN has no kernels for {dtype} here"


def _assemble(module: GraphModule, choices: Mapping[str, Any], made: dict[str, Kernel]) -> Built:
    """What was chosen, built; kernels by layer are taken from `made` and added to it."""
    found = Layers(module, _supported)
    reasons = found.reasons[::-1]
    channels_last = choices["layout"] == _CHANNELS_LAST
    noticed = found.noticed()
    if channels_last:
        for region in found.regions:
            hide(region)
    left = {layer for layer in found.layers if layer.spatial and (layer in noticed or not channels_last)}
    # The largest first: smaller ones fit into the holes that packing leaves in the heap, and calls then find none.
    for layer in sorted(found.layers, key=lambda layer: layer.weight.nbytes, reverse=True):
        key = found.key(layer)
        if layer in left or key in made:
            continue
        kernel = _kernel(layer, choices["kernels"].get(key, ""))
        if kernel is None:
            raise EngineError(
                f"engine 'onednn': there is no choice that fits layer '{key}': the choices are those of another "
                "module, or of another machine; lower it without them"
            )
        made[key] = kernel
    for layer in reversed(found.layers):
        if layer in left:
            reasons.append(found.skip(layer, f"it runs as torch runs it: {noticed.get(layer, choices['why'])}"))
        else:
            found.put(layer, made[found.key(layer)])
    return Built(bind(found.root), tuple(reasons), dict(choices), holds=(found.root,))


def _kernel(layer: Layer, name: str) -> Kernel | None:
    make = KERNELS.get(name)
    kernel = make(layer) if make is not None else None
    if layer.weight.nbytes >= _LARGE_BYTES:
        hand_back()
    return kernel


def _time_shortly(runs: Mapping[str, Run], inputs: Inputs, products: int) -> dict[str, float]:
    """See `_time`; by fewer rows where one call multiplies so often that it takes long."""
    if products > _MANY_PRODUCTS:
        rows = (inputs.batch_size or 1) * _MANY_PRODUCTS / 2 / products
        few = inputs.with_batch(max(1, int(rows)))
        with contextlib.suppress(Exception):  # a graph may hold for this batch alone
            return _time(runs, few or inputs)
    return _time(runs, inputs)


def _time(runs: Mapping[str, Run], inputs: Inputs) -> dict[str, float]:
    """Seconds that the shortest call of each takes, there and back again, so that what slows the machine slows both.

    Calls of one follow each other: what they leave behind in the heap does not fit the other, and is handed back.
    """
    calls, best = {name: caller(run, inputs) for name, run in runs.items()}, dict[str, float]()
    until = time.perf_counter() + _WHOLE_SECONDS
    for name, call in (*calls.items(), *reversed(calls.items())):
        for _ in range(_CALLS):
            if name in best and time.perf_counter() > until:
                break
            began = time.perf_counter()
            call()
            best[name] = min(best.get(name, math.inf), time.perf_counter() - began)
        hand_back()
    return best
