"""ptq: quantisation without training, from calibration data alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.fx as fx

from fxopt.batches import run_batches, unaffected
from fxopt.contract import Change, Promise, Skip
from fxopt.errors import PassError, SpecError
from fxopt.graph import Affine, GraphModule, Program, Region, observe, read_affine
from fxopt.inputs import Inputs
from fxopt.modules import is_quantized
from passes.qat.calibration import calibrate, why_not_whole
from passes.qat.correct import correct_biases
from passes.qat.equalize import equalize_layers, smooth, smoothable
from passes.qat.options import Quantization
from passes.qat.place import place, waiting


@dataclass(frozen=True)
class PTQ(Quantization):
    """Quantises a trained model by its calibration data: ranges evened out, quantisers placed, biases corrected.

        W x + b   =>   Q(W') Q(x') + b'

    Sources: Nagel et al. 2019 (equalization, bias correction); Xiao et al. 2023 (smoothing).
    """

    name: ClassVar[str] = "ptq"
    promise: ClassVar[Promise] = Promise.CHANGES
    after: ClassVar[tuple[str, ...]] = ("clean", "fuse")
    conflicts: ClassVar[tuple[str, ...]] = ("qat",)

    equalize: bool = field(default=True, metadata={"help": "even out the ranges of neighbouring layers' channels"})
    smooth: float = field(default=0.5, metadata={"help": "how much of outliers behind a layer norm moves into weights"})
    correct: bool = field(default=True, metadata={"help": "correct the mean error of each channel in the biases"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.smooth <= 1:
            raise SpecError(f"ptq: 'smooth' is a share from 0 to 1, not {self.smooth!r}")

    def run(self, region: Region) -> Iterator[Change | Skip]:
        """Even out what needs no data, then place the quantisers."""
        if region.mode is not None and region.mode is not region.module.training:
            return  # the graph of the other mode calls the same layers
        if region.training:
            if any(isinstance(read_affine(node, region), Affine) for node in region.graph.nodes):
                yield Skip(region.path or "the model", "it is in training mode; call .eval() on it before")
            return
        if self.equalize:
            yield from equalize_layers(region)
        yield from place(region, self.scheme, self.runtime, self.first_last == "keep", self.is_named)

    def finish(self, module: GraphModule, calibration: Iterable[Inputs]) -> Iterator[Change | Skip]:
        """Everything that data decides.

        Raises:
            PassError: without data, or for an `include` that no layer matches.
        """
        self.check_names(module)
        if not is_quantized(module):
            return
        batches = list(calibration)
        if not batches:
            raise PassError(
                "ptq: there is no calibration data; give `calibration_data()` in the model's file, or "
                "`fxopt.optimize(..., calibration_data=...)`: an iterable of inputs"
            )
        if self.smooth:
            yield from self._smoothed(module, batches)
        count = len(waiting(module))
        calibrate(module, batches)
        yield Change(f"calibrated on {len(batches)} batches ({self.observer})", f"{count} inputs")
        yield from why_not_whole(module)
        if self.correct:
            corrected = correct_biases(module, batches)
            yield Change("mean errors corrected in the biases", f"{len(corrected)} layers")

    def _smoothed(self, module: GraphModule, batches: list[Inputs]) -> Iterator[Change]:
        found = {
            norm: (region, layers) for region in Program(module).regions for norm, layers in smoothable(region).items()
        }
        largest: dict[fx.Node, torch.Tensor] = {}

        def visit(_: GraphModule, node: fx.Node, value: object) -> None:
            if node in found and isinstance(value, torch.Tensor) and value.numel():
                seen = value.detach().abs().reshape(-1, value.shape[-1]).amax(0)
                largest[node] = torch.maximum(largest[node], seen) if node in largest else seen

        with torch.no_grad(), unaffected(module):
            data = batches if found else ()
            run_batches(self.name, data, lambda each: observe(module, each.args, each.kwargs, visit))
        for norm, (region, layers) in found.items():
            if norm in largest:
                yield smooth(region, norm, layers, largest[norm], self.smooth)
