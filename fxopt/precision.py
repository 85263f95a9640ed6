"""Mixed precision: which of the layers that a pass has quantised stay floats after all, so that an accuracy holds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from fxopt.contract import Pass, Skip
from fxopt.errors import PassError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.revision import Kept, Revision, rerun
from fxopt.sensitivity import sensitivity

Accuracy = Callable[[nn.Module], Mapping[str, float]]
_NAME = "accuracy"


@dataclass(frozen=True)
class Precision(Revision):
    """Ranks the layers that a pass quantised, and leaves the costliest floats until an accuracy holds.

    Attributes:
        evaluate: gives named floats for a module, of which `accuracy`, or else the first, is held; the more the better.
        original: what the losses are measured against.
        max_drop: the share of the original's accuracy that may be lost; None ranks the layers and leaves none out.
        progress: told what begins.
    """

    evaluate: Accuracy | None
    original: nn.Module
    max_drop: float | None = None
    progress: Callable[[str], None] = lambda stage: None

    def concerns(self, each: Pass) -> bool:
        """Those that quantise."""
        return each.quantizes

    def revise(self, each: Pass, before: GraphModule, after: Kept, calibration: Sequence[Inputs]) -> Kept:
        """Rank the layers that a pass quantised by the calibration data, and see `Revision.revise`.

        Raises:
            PassError: where nothing can be ranked, `evaluate` gives nothing, or all of them as floats do not hold it.
        """
        self.progress(f"rank the layers of {each.name}")
        places = {change.where for change in after.changes}
        ranked = [one for one in sensitivity(after.module, calibration) if one.name in places]
        if self.max_drop is None:
            return dataclasses.replace(after, ranking=tuple(ranked))
        name, wanted = self._accuracy(self.original)
        least = wanted - abs(wanted) * self.max_drop
        chosen, value = after, self._accuracy(after.module)[1]
        low, high = 1, 0 if value >= least else len(ranked)
        while low <= high:  # the fewest floats that hold it: the more of them, the better it gets
            count = (low + high) // 2
            self.progress(f"{each.name} without its {count} costliest layers")
            trial = rerun(each, before, calibration, {one.name for one in ranked[:count]})
            found = self._accuracy(trial.module)[1]
            if found >= least or count == len(ranked):
                chosen, value, high = trial, found, count - 1
            else:
                low = count + 1
        if not value >= least:  # NaN is no accuracy that holds
            raise PassError(
                f"max_drop: {name} is {value:.4g} even with all {len(ranked)} layers of '{each.name}' left floats, and "
                f"{least:.4g} was to be held, of {wanted:.4g}; allow a larger drop, or see what `evaluate` measures"
            )
        ranking = tuple(dataclasses.replace(one, kept=one.name in chosen.spared) for one in ranked)
        kept = [
            Skip(one.name, f"it stays a float: {name} is {value:.4g} then, and {least:.4g} was to be held")
            for one in ranking
            if one.kept
        ]
        return dataclasses.replace(chosen, skips=(*chosen.skips, *kept), ranking=ranking)

    def _accuracy(self, module: nn.Module) -> tuple[str, float]:
        found = self.evaluate(module) if self.evaluate is not None else {}
        if not found:
            raise PassError("max_drop: there is no accuracy to hold; give `evaluate(module)` -> a dict of floats")
        name = _NAME if _NAME in found else next(iter(found))
        return name, float(found[name])
