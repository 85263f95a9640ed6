"""Engines held against each other: built within a budget, verified, and measured in pairs with the original."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxopt import bench
from fxopt.bench.statistics import paired_interval
from fxopt.capture.state import state_kept
from fxopt.engines.candidates import ALL, AUTO, Rung, candidates
from fxopt.engines.executable import Executable
from fxopt.engines.exports import Exports
from fxopt.engines.gpu import rounding_of_torch
from fxopt.engines.lower import after_passes, build
from fxopt.engines.once import once
from fxopt.engines.parity import agreement
from fxopt.engines.place import on
from fxopt.engines.table import find
from fxopt.engines.unquantized import unquantized
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.modules import is_quantized
from fxopt.relative_error import TOLERANCE, relative_error
from fxopt.verify import Oracle, Trial

_LOWEST_BFLOAT16_ERROR = 1e-3
"""bfloat16 keeps 8 bits: no model stays closer than this, so a tighter bound rules it out before it is built."""
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
    tried, rungs = candidates(asked, rewritten, place), list[Rung]()
    named = asked not in (AUTO, ALL)
    subjects = {False: (rewritten, judge)}
    with Exports() as exports:
        for rung in tried:
            why_not = _why_not_built(rung, rungs)
            spent = (time.perf_counter() - began) / budget_seconds
            # However short it is, there is to be something to choose beside eager.
            enough = any(not one.dropped for one in rungs[1:])
            late = spent > (_SLOW_BUILDING if rung.compiles else _BUILDING)
            if rungs and not named and late and (enough or rung.compiles):
                why_not = f"the budget of {budget_seconds:g} s was short"
            if why_not is not None:
                rungs.append(dataclasses.replace(rung, dropped=f"not built: {why_not}"))
                continue
            tell(f"build {rung.label}")
            if rung.in_floats and True not in subjects:
                in_floats = unquantized(rewritten)
                subjects[True] = (in_floats, Oracle(in_floats, inputs, seed))
            subject, knows = subjects[rung.in_floats]
            with exports.after(rung.beforehand):
                rungs.append(_built(rung, subject, inputs, place, knows, max_error, named, exports))
            if named and rung is _asked_for(tried) and rungs[-1].dropped:
                raise EngineError(rungs[-1].dropped)
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


def _why_not_built(rung: Rung, before: Sequence[Rung]) -> str | None:
    """What makes a rung superfluous among those that were built before it."""
    faster = any(one.label == rung.closer_than and not one.dropped for one in before)
    return f"the error of {rung.closer_than} is allowed" if faster else None


def _built(
    rung: Rung,
    module: GraphModule,
    inputs: Inputs,
    place: torch.device,
    oracle: Oracle,
    max_error: float | None,
    named: bool,
    exports: Exports,
) -> Rung:
    max_error = rung.options.get("max_error", max_error)  # its own goes first
    lowest = 0.0 if "tf32" in rung.options else _LOWEST_BFLOAT16_ERROR
    if rung.is_rounded and not rung.in_floats and (max_error is None or max_error < lowest):
        return dataclasses.replace(
            rung, dropped="not built: fewer bits need a bound on the error: give a max_error, such as 1e-2"
        )
    before = _resident(place)
    began = time.perf_counter()
    try:
        rewritten = after_passes(module, rung.passes) if rung.passes else module
        seconds = time.perf_counter() - began
        engine = find(rung.engine, rung.options)
        missing = engine.in_vain(rewritten) if rung.is_rounded and (rung.in_floats or not named) else None
        if missing is not None:
            return dataclasses.replace(rung, dropped=f"not built: {missing}")
        executable = build(engine if max_error is None else engine.within(max_error), rewritten, inputs)
        errors = _errors(executable, place, oracle)
    except EngineError as error_:
        return dataclasses.replace(rung, dropped=str(error_))
    except Exception as error_:  # whatever the insides of another project raise
        return dataclasses.replace(rung, dropped=f"{type(error_).__name__}: {error_}")
    after = _resident(place)
    found = dataclasses.replace(
        rung,
        executable=executable,
        build_seconds=seconds + executable.build_seconds,
        relative_error=max((error for error, _, _ in errors), default=0.0),
        resident_bytes=None if before is None or after is None else max(after - before, 0),
    )
    for error, allowed, index in errors:
        bound = allowed if max_error is None else max_error
        if rung.in_floats:  # it is shown, and never chosen
            bound = max(bound, engine.tolerance(torch.float32))
        if not error <= bound:
            return dataclasses.replace(found, dropped=f"output {index} differs by {error:.2e} (allowed {bound:g})")
    if not engine.integers or not is_quantized(rewritten):
        return found
    size = None if executable.built.write is None else exports.size(rung.beforehand)
    pairs = [
        pair
        for trial, values in _outputs(executable, place, oracle)
        for pair in zip(trial.expected.values, values, strict=True)
    ]
    return dataclasses.replace(found, parity=(agreement(pairs, size),))


def _errors(executable: Executable, place: torch.device, oracle: Oracle) -> list[tuple[float, float, int]]:
    """The relative error of each output over the trials that it takes, what its dtype allows, and which output it is.

    The largest error comes first.
    """
    rounding = max(executable.rounding, rounding_of_torch(place))
    found = []
    for trial, values in _outputs(executable, place, oracle):
        for index, (expected, value) in enumerate(zip(trial.reference.values, values, strict=True)):
            if isinstance(expected, torch.Tensor):
                error = relative_error(expected, value.to(expected.device))
                allowed = (TOLERANCE.get(dtype, 0.0) for dtype in {value.dtype, *executable.dtypes})
                found.append((error, max(rounding, *allowed), index))
    return sorted(found, reverse=True)


def _outputs(executable: Executable, place: torch.device, oracle: Oracle) -> Iterator[tuple[Trial, list[Any]]]:
    """The trials that it takes, and what it gives for each."""
    for index, trial in enumerate(oracle.trials):
        try:
            values, structure = once(executable, executable.holds, trial.inputs.to(place))
        except EngineError:
            if index == 0:
                raise
            continue  # sizes that it was not built for
        if structure != trial.expected.structure:
            raise EngineError(f"engine '{executable.engine.name}' gives outputs that are nested otherwise")
        yield trial, values


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


def _resident(place: torch.device) -> int | None:
    """Bytes of this process that are in the memory of a device: for the CPU as Linux tells them."""
    if place.type == "cuda":
        return torch.cuda.memory_allocated(place)
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmRSS:")), None)
