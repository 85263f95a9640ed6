"""When, in training, quantisation begins and what is still to move comes to rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from fxopt.errors import PassError
from fxopt.modules import FakeQuantize, Fused, State


class QATSchedule:
    """Drives the quantisers and batch norms of a module, step by step of its optimizer.

    Until `quantize_from` quantisers observe in training mode and pass on what they are given; from then on they round,
    and their ranges follow the data until `freeze_ranges_at`. From `freeze_norms_at` batch norms that `fuse` joined
    with their layers normalise by the running statistics, as the folded model will (Krishnamoorthi 2018, section 4).
    Learned scales train in between alone: DistributedDataParallel needs `find_unused_parameters=True` for that.

    Args:
        module: what the pass `qat` has been through.
        quantize_from: step at which rounding begins; 0 is at once.
        freeze_norms_at: step at which the statistics of batch norms come to rest; None lets them move.
        freeze_ranges_at: step at which ranges come to rest; None lets them move.

    Raises:
        PassError: where there is nothing to drive, or ranges would rest before anything is rounded.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        quantize_from: int = 0,
        freeze_norms_at: int | None = None,
        freeze_ranges_at: int | None = None,
    ):
        self._quantizers = [child for child in module.modules() if isinstance(child, FakeQuantize)]
        self._layers = [child for child in module.modules() if isinstance(child, Fused) and child.bn is not None]
        if not self._quantizers:
            raise PassError("QATSchedule: the module has no fake quantisers; put them in with the pass 'qat' first")
        if freeze_ranges_at is not None and freeze_ranges_at < quantize_from:
            raise PassError(
                f"QATSchedule: ranges would rest at step {freeze_ranges_at}, before rounding begins at step "
                f"{quantize_from}; let freeze_ranges_at be later"
            )
        self.quantize_from = quantize_from
        self.freeze_norms_at = freeze_norms_at
        self.freeze_ranges_at = freeze_ranges_at
        self.steps = 0
        self._apply()

    def step(self) -> None:
        """One step of the optimizer is done."""
        self.steps += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        """What is to be saved beside the module, which has the ranges themselves."""
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the module's state of then."""
        self.steps = int(state["steps"])
        for quantizer in self._quantizers:
            if quantizer.state is not State.FROZEN:
                quantizer.state = self._state  # not settled anew: scales may have been trained since they were
        self._apply()

    @property
    def _state(self) -> State:
        if self.steps < self.quantize_from:
            return State.OBSERVE
        rests = self.freeze_ranges_at is not None and self.steps >= self.freeze_ranges_at
        return State.FROZEN if rests else State.QUANTIZE

    def _apply(self) -> None:
        state = self._state
        for quantizer in self._quantizers:
            if quantizer.state is State.OBSERVE and state is not State.OBSERVE:
                quantizer.settle()
            # Freezing is for good: calibrating anew is what begins again.
            if quantizer.state is not State.FROZEN:
                quantizer.state = state
            if quantizer.learned and quantizer.state is State.FROZEN:
                quantizer.scale.requires_grad_(False)
                quantizer.scale.grad = None  # by one of zeros an optimizer's momentum would still move it
        for layer in self._layers:
            layer.norm_frozen = self.freeze_norms_at is not None and self.steps >= self.freeze_norms_at
