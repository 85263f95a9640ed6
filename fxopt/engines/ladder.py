"""Engines held against each other: built within a budget, verified, and measured in pairs with the original."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fxopt import bench
from fxopt.bench.statistics import paired_interval
from fxopt.capture.state import state_kept
from fxopt.engines.builder import Builder
from fxopt.engines.candidates import ALL, AUTO, Rung, candidates
from fxopt.engines.exports import Exports
from fxopt.engines.place import on
from fxopt.engines.table import find
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.verify import Oracle

_BUILDING, _SLOW_BUILDING = 0.6, 0.25
"""Shares of the budget after which no further build begins, and none that compiles: it takes up to minutes."""
_TOGETHER = 0.75
"""Share of the time to measure that goes to all engines; the rest is for the two that are ahead, where these rounds
can't tell them apart."""
_SHORTEST_MEASUREMENT = 1.0


@dataclass(frozen=True)
class Ladder:
    """Engines, measured.

    Attributes:
        asked: what for: an engine, "auto" or "all".
        device: on which they were built and measured.
        rungs: in the order in which they were tried.
        chosen: the one to use; None where nothing was to be chosen.
        max_error: the relative error that was allowed; None for what each dtype allows.
        budget_seconds: for all of it.
        seconds: that it took.
    """

    asked: str
    device: str
    rungs: tuple[Rung, ...]
    chosen: Rung | None
    max_error: float | None
    budget_seconds: float
    seconds: float


def climb(
    asked: str,
    original: nn.Module,
    rewritten: GraphModule,
    inputs: Inputs,
    *,
    device: torch.device | str = "cpu",
    oracle: Oracle | None = None,
    max_error: float | None = None,
    budget_seconds: float = 60.0,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> Ladder:
    """Build engines for a rewritten module, verify each, and measure them beside the original.

    Args:
        asked: an engine, such as `openvino{precision=bf16}`, which is then chosen, beside `eager`; "auto" for all, of
            which the fastest is chosen; "all" to choose none. Where they run a quantised module on integers, what that
            is in float32 and bfloat16 is measured, too, and never chosen.
        original: what they are held against, in latency and, by `oracle`, in outputs.
        rewritten: what they run.
        inputs: an example.
        device: where engines run and are measured; what is elsewhere is copied there.
        oracle: knows what the outputs should be; None where passes changed them on purpose: then the rewritten module
            does.
        max_error: the largest relative error of outputs; None for what each dtype allows.
        budget_seconds: for builds and measurements. A build that has begun is finished, one engine beside eager is
            built in any case, and two fifths of the budget are left to measure what was built, however long that took.
        seed: of the order of the pairs, and of random inputs.
        progress: told what begins.

    Raises:
        EngineError: for an unknown engine, or where the one that was asked for can't be used.
    """
    began = time.perf_counter()
    tell = progress or (lambda stage: None)
    judge = oracle or Oracle(rewritten, inputs, seed)
    place = torch.device(device)
    rewritten, inputs = on(place, rewritten), inputs.to(place)
    named = asked not in (AUTO, ALL)
    with Exports() as exports:
        builder = Builder(rewritten, inputs, place, judge, seed, max_error, named, exports)
        rungs = _build(candidates(asked, rewritten, place), builder, began, budget_seconds, tell)
    running = [rung for rung in rungs if not rung.dropped]
    if not running:
        raise EngineError(rungs[0].dropped)
    # What is measured in too short a time is chosen by chance, so builds that took too long leave it its share.
    until = max(began + budget_seconds, time.perf_counter() + (1 - _BUILDING) * budget_seconds)
    tell("measure the engines in turns")
    share = _TOGETHER if asked == AUTO else 1.0
    with state_kept(*(held for rung in running if rung.executable is not None for held in rung.executable.holds)):
        found = _together(original, running, inputs, place, share * (until - time.perf_counter()), seed)
        rungs = [rung if rung.dropped else dataclasses.replace(rung, comparison=found[rung.label]) for rung in rungs]
        chosen = _asked_for(rungs) if named else None
        if asked == AUTO:
            left = until - time.perf_counter()
            rivals = [rung for rung in rungs if rung.comparison and not rung.in_floats]
            chosen = _fastest(rivals, inputs, place, left, seed)
    return Ladder(asked, str(place), tuple(rungs), chosen, max_error, budget_seconds, time.perf_counter() - began)


def check(asked: str) -> None:
    """Make sure that there is what is asked for, before much work is put into it.

    Raises:
        EngineError: for an unknown engine, or one that cannot run here.
    """
    if asked not in (AUTO, ALL):
        find(asked, {})


def _asked_for(rungs: Sequence[Rung]) -> Rung:
    """The one that was named: `eager` comes before it, and what it is measured beside in floats behind."""
    return next(rung for rung in reversed(rungs) if not rung.in_floats)


def _build(
    tried: Sequence[Rung], builder: Builder, began: float, budget_seconds: float, tell: Callable[[str], None]
) -> list[Rung]:
    """One after another, what the budget has time for.

    Raises:
        EngineError: where the one that was asked for by its name can't be used.
    """
    rungs = list[Rung]()
    for rung in tried:
        spent = (time.perf_counter() - began) / budget_seconds
        # However short it is, there is to be something to choose beside eager.
        enough = rung.compiles or any(not one.dropped for one in rungs[1:])
        late = enough and spent > (_SLOW_BUILDING if rung.compiles else _BUILDING)
        if any(one.label == rung.closer_than and not one.dropped for one in rungs):
            rung = dataclasses.replace(rung, dropped=f"not built: the error of {rung.closer_than} is allowed")
        elif rungs and late and not builder.named:
            rung = dataclasses.replace(rung, dropped=f"not built: the budget of {budget_seconds:g} s was short")
        else:
            tell(f"build {rung.label}")
            rung = builder.build(rung)
        rungs.append(rung)
        if builder.named and rung.dropped and len(rungs) == 2:  # what was asked for comes behind eager
            raise EngineError(rung.dropped)
    return rungs


def _together(
    before: Callable[..., Any], rungs: Sequence[Rung], inputs: Inputs, place: torch.device, seconds: float, seed: int
) -> dict[str, bench.Comparison]:
    """What was before with each rung, by label: all in the same rounds."""
    # Their own calls, since copies would have to be built again.
    calls = {rung.label: rung.executable.forward for rung in rungs if rung.executable is not None}
    found = bench.compare_all(before, calls, inputs, place, budget_seconds=seconds, seed=seed)
    return {
        label: dataclasses.replace(one, notes=tuple(note for note in one.notes if "cannot be copied" not in note))
        for label, one in found.items()
    }


def _fastest(rungs: Sequence[Rung], inputs: Inputs, place: torch.device, left: float, seed: int) -> Rung:
    """The rung with the smallest ratio; where the second may be as fast, and there is time, the two meet once more.

    What they took in either is held together: a core that others slow down for a while slows engines differently, those
    most that give each thread its share of the work beforehand. Of two that are as fast as each other it is the one
    that builds sooner.
    """

    def ratio(rung: Rung) -> float:
        assert rung.comparison is not None
        return rung.comparison.ratio

    ranked = sorted(rungs, key=ratio)
    if len(ranked) < 2:
        return ranked[0]
    first, second = ranked[:2]
    assert first.comparison is not None and second.comparison is not None
    rounds = first.comparison.times.after, second.comparison.times.after
    if paired_interval(*rounds, seed=seed).low > 1 or left < _SHORTEST_MEASUREMENT:
        return first
    assert first.executable is not None
    final = _together(first.executable.forward, [second], inputs, place, left, seed)[second.label]
    all_of = paired_interval(rounds[0] + final.times.before, rounds[1] + final.times.after, seed=seed)
    if all_of.reach <= final.margin:
        return min(first, second, key=lambda rung: rung.build_seconds or 0.0)
    return second if all_of.ratio < 1 else first
