"""qat: a model that trains with the rounding that integers will bring."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from fxopt.contract import Change, Promise, Skip
from fxopt.graph import GraphModule, Region
from fxopt.inputs import Inputs
from fxopt.sensitivity import Sensitivity, sensitivity
from passes.qat.calibration import calibrate, why_not_whole
from passes.qat.freeze import QuantizeFreeze
from passes.qat.options import Quantization
from passes.qat.place import place, waiting
from passes.qat.ptq import PTQ
from passes.qat.schedule import QATSchedule
from passes.qat.scheme import Scheme

__all__ = ["PTQ", "QAT", "QATSchedule", "QuantizeFreeze", "Sensitivity", "calibrate", "sensitivity"]


@dataclass(frozen=True)
class QAT(Quantization):
    """Puts fake quantisers on the weights and inputs of convolutions and linear layers.

        W x + b   =>   Q(W) Q(x) + b        Q(v) = (clamp(round(v / s) + z, low, high) - z) s

    Weights are signed and symmetric, with a scale for each output channel; tables that are looked up or added have
    one for each row. Inputs have one scale a tensor, shared by all layers that read the same value. Gradients pass
    straight through the rounding. Ranges of inputs come from `calibrate`, or from the first batches of training; until
    then they are not quantised. In training they follow the data: by `minmax` they only widen, by `ema` they shrink,
    too.

    Adam's steps are as long as its rate, and a learned scale of 8 bits is hardly longer: give scales a group of their
    own, at a twentieth of the rate and without weight decay, as examples/qat_digits.py does.

    Sources: Jacob et al. 2018; Krishnamoorthi 2018.
    """

    name: ClassVar[str] = "qat"
    promise: ClassVar[Promise] = Promise.CHANGES
    after: ClassVar[tuple[str, ...]] = ("clean", "fuse")

    learned: Literal[False, "lsq"] = field(default=False, metadata={"help": "lsq: scales are parameters and train"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self._one_of("learned", (False, "lsq"))

    @property
    def scheme(self) -> Scheme:
        """What the options say of quantisers."""
        return dataclasses.replace(super().scheme, learned=self.learned == "lsq")

    def run(self, region: Region) -> Iterator[Change | Skip]:
        """Quantise the weight and the input of each layer, and what the target wants besides."""
        yield from place(region, self.scheme, self.runtime, self.first_last == "keep", self.is_named)

    def finish(self, module: GraphModule, calibration: Iterable[Inputs]) -> Iterator[Change | Skip]:
        """Calibrate with the data that there is.

        Raises:
            PassError: for an `include` that no layer matches.
        """
        self.check_names(module)
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
        calibrate(module, batches)
        yield Change(f"calibrated on {len(batches)} batches ({self.observer})", f"{count} inputs")
        yield from why_not_whole(module)
