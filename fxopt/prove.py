"""Pay or revert: what a pass did for speed stays only where measuring shows the module to be faster with it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fxopt import bench
from fxopt.bench import Comparison, Verdict
from fxopt.contract import Change, Pass
from fxopt.engines.candidates import ALL, AUTO
from fxopt.engines.lower import build
from fxopt.engines.place import on
from fxopt.engines.table import find
from fxopt.errors import SpecError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.ledger import Proof
from fxopt.revision import Kept, Revision, rerun

PASS, MATCH = "pass", "match"
_MARGIN = 0.01
"""The smallest gain that a pass is kept for, as a share."""
_WHOLE, _FINAL = 0.25, 0.25
"""Shares of the budget for measuring all changes together, first and last; what is between is for single ones."""
_SHORTEST_SECONDS = 0.5
_WITH_THE_PASS = "it goes with the pass"

Measure = Callable[[GraphModule, GraphModule, float], Comparison]
"""Compares two modules within about so many seconds."""


def check(level: str) -> None:
    """Make sure that there is such a level of proof.

    Raises:
        SpecError: where there is not.
    """
    if level not in (PASS, MATCH):
        raise SpecError(f"prove: expected '{PASS}' to measure each pass, or '{MATCH}' each change, not {level!r}")


def measuring(inputs: Inputs, device: torch.device, engine: str | None, seed: int) -> Measure:
    """A comparison on a device, of modules as one engine runs them; as torch does where none is named."""
    plain, given = engine in (None, "eager", AUTO, ALL), inputs.to(device)

    def measure(before: GraphModule, after: GraphModule, seconds: float) -> Comparison:
        def side(module: GraphModule) -> Callable[..., object]:
            return module if plain else build(find(str(engine), {}), on(device, module), given).forward

        return bench.compare(
            side(before), side(after), given, device, budget_seconds=seconds, margin=_MARGIN, seed=seed
        )

    return measure


@dataclass(frozen=True)
class Prover(Revision):
    """Measures what passes did, and reverts what does not pay.

    A pass stays if the module is measured to be faster with it. At the level of matches each place that it changed is
    left out in turn: what costs is reverted, even of a pass that pays; what pays is kept, even of one that does not;
    and what is too small to tell goes with the pass.

    Attributes:
        measure: compares two modules.
        level: "pass" or "match".
        budget_seconds: about how long to measure for one pass.
        progress: told what begins.
    """

    measure: Measure
    level: str = PASS
    budget_seconds: float = 30.0
    progress: Callable[[str], None] = lambda stage: None

    def concerns(self, each: Pass) -> bool:
        """Those that are there for speed."""
        return each.for_speed

    def revise(self, each: Pass, before: GraphModule, after: Kept, calibration: Sequence[Inputs]) -> Kept:
        """Measure what a pass gained, and see `Revision.revise`."""
        began = time.perf_counter()
        places = list(dict.fromkeys(change.where for change in after.changes))
        singly = self.level == MATCH and len(places) > 1
        self.progress(f"prove {each.name}")
        whole = self.measure(before, after.module, self.budget_seconds * (_WHOLE if singly else 1.0))
        if not singly:
            return _concluded(before, after, whole, ())

        pays, current = whole.verdict is Verdict.FASTER, after
        singles: dict[str, Proof] = {}
        for number, place in enumerate(places):
            made = tuple(change for change in after.changes if change.where == place)
            left = (1 - _FINAL) * self.budget_seconds - (time.perf_counter() - began)
            if place not in _places(current):
                singles[place] = Proof(place, False, "it rested on what was reverted", made)
                continue
            if left < _SHORTEST_SECONDS:
                spent = f"not measured: the budget of {self.budget_seconds:g} s was spent; {_WITH_THE_PASS}"
                singles[place] = Proof(place, pays, spent, made)
                continue
            self.progress(f"prove {each.name}: {place} ({number + 1} of {len(places)})")
            without = rerun(each, before, calibration, current.spared | {place})
            if place in _places(without):
                reason = f"not measured: it cannot be left out alone; {_WITH_THE_PASS}"
                singles[place] = Proof(place, True, reason, made)
                continue
            seconds = max(left / (len(places) - number), _SHORTEST_SECONDS)
            found = self.measure(without.module, current.module, seconds)
            singles[place] = _judged(place, made, found, pays)
            if found.verdict is Verdict.SLOWER:
                current = without
        reverted = {place for place, proof in singles.items() if not proof.kept} & _places(current)
        if reverted:
            current = rerun(each, before, calibration, current.spared | reverted)
        if current.spared and current.changes:
            self.progress(f"prove {each.name}: what is left of it")
            left = max(self.budget_seconds - (time.perf_counter() - began), _SHORTEST_SECONDS)
            whole = self.measure(before, current.module, left)
        return _concluded(before, current, whole, tuple(singles.values()))


def _places(proven: Kept) -> set[str]:
    return {change.where for change in proven.changes}


def _judged(place: str, made: tuple[Change, ...], found: Comparison, pays: bool) -> Proof:
    if found.verdict is Verdict.FASTER:
        return Proof(place, True, "", made, found)
    if found.verdict is Verdict.SLOWER:
        return Proof(place, False, "the module is faster without it", made, found)
    return Proof(place, pays, f"too small to tell; {_WITH_THE_PASS}", made, found)


_REASONS = {
    Verdict.FASTER: "",
    Verdict.SLOWER: "the module is slower with it",
    Verdict.EQUIVALENT: "the module is as fast without it",
    Verdict.INCONCLUSIVE: "no gain could be shown",
}


def _concluded(before: GraphModule, after: Kept, whole: Comparison, singles: tuple[Proof, ...]) -> Kept:
    """`after` if it pays, else `before`."""
    kept = bool(after.changes) and whole.verdict is Verdict.FASTER
    reason = _REASONS[whole.verdict] if after.changes else "none of its changes pays"
    if after.changes and whole.verdict is Verdict.INCONCLUSIVE and whole.notes:
        reason = f"{reason}: {whole.notes[0]}"
    made = after.changes or tuple(change for proof in singles for change in proof.changes)
    first = Proof("", kept, reason, made, whole)
    if kept:
        return dataclasses.replace(after, proofs=(first, *singles))
    singles = tuple(dataclasses.replace(proof, kept=False) for proof in singles)
    return Kept(before, (), after.skips, proofs=(first, *singles))
