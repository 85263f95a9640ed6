"""qat: a model that trains with the rounding that integers will bring."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from fxopt.contract import Change, Pass, Promise, Skip
from fxopt.errors import SpecError
from fxopt.graph import GraphModule, Region
from fxopt.inputs import Inputs
from passes.qat.calibration import calibrate
from passes.qat.freeze import QuantizeFreeze
from passes.qat.place import TARGETS, Target, place, waiting
from passes.qat.ptq import PTQ
from passes.qat.schedule import QATSchedule
from passes.qat.scheme import Scheme
from passes.qat.sensitivity import Sensitivity, sensitivity

__all__ = ["PTQ", "QAT", "QATSchedule", "QuantizeFreeze", "Sensitivity", "calibrate", "sensitivity"]


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

    bits: int = field(default=8, metadata={"help": "width of weights and inputs: 2 to 8, or 16"})
    weights: str = field(default="", metadata={"help": "int8, int4, …: of weights, where another than bits"})
    activations: str = field(
        default="", metadata={"help": "of inputs, where another than unsigned bits: uint8, int8 (around 0), …, none"}
    )
    per_channel: bool = field(default=True, metadata={"help": "a scale for each output channel of a weight"})
    observer: Literal["minmax", "ema", "histogram", "mse", "percentile"] = field(
        default="minmax",
        metadata={
            "help": "range of inputs: all that was seen (minmax), a moving average (ema), or from a histogram of the "
            "calibration data the least divergence (histogram), the least error (mse), all but 0.01 % (percentile)"
        },
    )
    learned: Literal[False, "lsq"] = field(default=False, metadata={"help": "lsq: scales are parameters and train"})
    target: Target = field(default="generic", metadata={"help": "the runtime whose integer kernels shall fuse"})
    first_last: Literal["quantize", "keep"] = field(
        default="quantize", metadata={"help": "keep leaves the first and the last layers floats"}
    )
    include: str = field(default="*", metadata={"help": "glob over the layer's qualified name"})
    exclude: str = field(default="", metadata={"help": "glob over the layer's qualified name; wins over include"})

    def __post_init__(self) -> None:
        _ = self.scheme
        for name, known in (("target", TARGETS), ("first_last", ("quantize", "keep")), ("learned", (False, "lsq"))):
            if getattr(self, name) not in known:
                raise SpecError(f"qat: {name!r} is one of {', '.join(map(str, known))}, not {getattr(self, name)!r}")

    @property
    def scheme(self) -> Scheme:
        """What the options say of quantisers."""
        return Scheme.of(
            self.name,
            bits=self.bits,
            weights=self.weights,
            activations=self.activations,
            per_channel=self.per_channel,
            observer=self.observer,
            learned=self.learned == "lsq",
        )

    def run(self, region: Region) -> Iterator[Change | Skip]:
        """Quantise the weight and the input of each layer, and what the target wants besides."""
        yield from place(region, self.scheme, self.target, self.first_last == "keep", self._is_named)

    def finish(self, module: GraphModule, calibration: Iterable[Inputs]) -> Iterator[Change | Skip]:
        """Calibrate with the data that there is."""
        count = len(waiting(module))
        if not count:
            return
        batches = list(calibration)
        if not batches:
            yield Skip(
                "inputs",
                f"no calibration data: {count} inputs are not quantised until training or `calibrate` has "
                "shown their ranges",
            )
            return
        missed = calibrate(module, batches)
        yield Change(f"calibrated on {len(batches)} batches ({self.observer})", f"{count} inputs")
        for name in missed:
            yield Skip(name, "no calibration batch reached it: it does not quantise until one does")

    def _is_named(self, name: str) -> bool:
        return fnmatchcase(name, self.include) and not fnmatchcase(name, self.exclude)
