"""qat: a model that trains with the rounding that integers will bring."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

import torch
import torch.fx as fx
from torch import nn

from fxopt.contract import Change, Pass, Promise, Skip
from fxopt.errors import SpecError
from fxopt.graph import Affine, GraphModule, Region, read_affine, source_of
from fxopt.inputs import Inputs
from fxopt.modules import FakeQuantize
from passes.qat.calibration import calibrate
from passes.qat.insert import Activations, quantize_weight

__all__ = ["QAT", "calibrate"]

_BITS = (*range(2, 9), 16)
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.MultiheadAttention)


@dataclass(frozen=True)
class QAT(Pass):
    """Puts fake quantisers on the weights and inputs of convolutions and linear layers.

        W x + b   =>   Q(W) Q(x) + b        Q(v) = (clamp(round(v / s) + z, low, high) - z) s

    Weights are signed and symmetric, with a scale for each output channel; inputs have one scale a tensor,
    shared by all layers that read the same value. Gradients pass straight through the rounding. Ranges of
    inputs come from `calibrate`, or from the first batches of training; until then they are not quantised.

    Sources: Jacob et al. 2018; Krishnamoorthi 2018.
    """

    name: ClassVar[str] = "qat"
    promise: ClassVar[Promise] = Promise.CHANGES
    after: ClassVar[tuple[str, ...]] = ("clean", "fuse")

    bits: int = field(default=8, metadata={"help": "width of weights and activations: 2 to 8, or 16"})
    weight_bits: int | None = field(default=None, metadata={"help": "width of weights, where another than bits"})
    activation_bits: int | None = field(default=None, metadata={"help": "width of inputs, where another than bits"})
    per_channel: bool = field(default=True, metadata={"help": "a scale for each output channel of a weight"})
    symmetric: bool = field(default=False, metadata={"help": "signed inputs around 0; unsigned is better after ReLU"})
    observer: Literal["minmax", "ema"] = field(
        default="minmax", metadata={"help": "range of inputs: all that was seen (minmax) or a moving average (ema)"}
    )
    include: str = field(default="*", metadata={"help": "glob over the layer's qualified name"})
    exclude: str = field(default="", metadata={"help": "glob over the layer's qualified name; wins over include"})

    def __post_init__(self) -> None:
        for name in ("bits", "weight_bits", "activation_bits"):
            value = getattr(self, name)
            if value not in _BITS and not (value is None and name != "bits"):
                raise SpecError(f"qat: '{name}' is 2 to 8, or 16, not {value!r}")
        if self.observer not in ("minmax", "ema"):
            raise SpecError(f"qat: 'observer' is 'minmax' or 'ema', not {self.observer!r}")

    def run(self, region: Region) -> Iterator[Change | Skip]:
        """Quantise the weight and the input of each layer."""
        activations = Activations(region, self._for_input)
        for node in list(region.graph.nodes):
            name = region.qualified(node)
            if not fnmatchcase(name, self.include) or fnmatchcase(name, self.exclude):
                continue
            layer = read_affine(node, region)
            if isinstance(layer, Affine):
                weight = quantize_weight(layer, self._for_weight, region)
                value = activations.quantize(layer)
                if weight or value:
                    yield Change(self._what(weight, value), name, source_of(node))
            elif layer is not None:
                yield layer
            elif (reason := _why_out_of_reach(node, region)) is not None:
                yield Skip(name, reason, source_of(node))

    def finish(self, module: GraphModule, calibration: Iterable[Inputs]) -> Iterator[Change | Skip]:
        """Calibrate with the data that there is."""
        waiting = [name for name, child in module.named_modules() if _waits(child)]
        if not waiting:
            return
        batches = list(calibration)
        if not batches:
            yield Skip(
                "inputs",
                f"no calibration data: {len(waiting)} inputs are not quantised until training or `calibrate` has "
                "shown their ranges",
            )
            return
        missed = calibrate(module, batches)
        yield Change(f"calibrated on {len(batches)} batches ({self.observer})", f"{len(waiting)} inputs")
        for name in missed:
            yield Skip(name, "no calibration batch reached it: it does not quantise until one does")

    def _what(self, weight: bool, value: bool) -> str:
        bits = (self.weight_bits or self.bits, self.activation_bits or self.bits)
        return " and ".join(
            f"{part} fake-quantised to {width} bits"
            for part, width, done in zip(("weight", "input"), bits, (weight, value), strict=True)
            if done
        )

    def _for_weight(self, channel_axis: int, weight: torch.Tensor) -> FakeQuantize:
        axis = channel_axis if self.per_channel else None
        channels = weight.shape[channel_axis]
        bits = self.weight_bits or self.bits
        made = FakeQuantize(
            bits, symmetric=True, axis=axis, channels=channels, observer="current", device=weight.device
        )
        made.observe(weight)
        return made

    def _for_input(self, weight: torch.Tensor) -> FakeQuantize:
        bits = self.activation_bits or self.bits
        return FakeQuantize(bits, symmetric=self.symmetric, observer=self.observer, device=weight.device)


def _waits(module: nn.Module) -> bool:
    return isinstance(module, FakeQuantize) and not module.ready


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
