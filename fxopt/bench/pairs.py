"""Modules timed in turns with another, together with a copy of that one."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.bench.arm import Arm
from fxopt.bench.comparison import BeforeAfter, Comparison
from fxopt.bench.conclusion import conclude
from fxopt.bench.cuda import CudaTimer
from fxopt.bench.device import measurable
from fxopt.bench.idle import wait_until_idle
from fxopt.bench.memory import peak_memory
from fxopt.bench.statistics import FEWEST_PAIRS, paired_interval
from fxopt.bench.surroundings import quiet
from fxopt.bench.timer import LEAD, TICK, CpuTimer, Sample, Timer, timed_together
from fxopt.inputs import Inputs

_ENOUGH_PAIRS = 30
_MOST_PAIRS = 1000
_WARM_UP = 0.1
"""Share of the budget."""
_LONG_CALL = 0.1
"""Seconds: what slows a CPU down at first takes a few milliseconds in all, which hardly count in a longer call."""

Progress = Callable[[float], None]
"""Told the share of the work that is done, from 0 to 1."""


def compare(
    before: Callable[..., Any],
    after: Callable[..., Any],
    inputs: Any,
    device: torch.device | str = "cpu",
    *,
    pairs: int | None = None,
    budget_seconds: float = 10.0,
    margin: float = 0.02,
    threads: int | None = None,
    cold_cache: bool = False,
    graph: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    timer: Timer | None = None,
) -> Comparison:
    """Compare the latency of two modules, in one process and in turns.

    Each round times both, and a copy of the first, in an order drawn at random and then in the reverse one, so
    that drift, warm caches and periodic disturbances hit all alike. The copy tells how large a difference noise
    alone makes here, and no smaller one is called a difference. Each begins once no thread runs any more that the one
    before has left. On a CPU short calls are timed behind 20 ms of others, where the budget allows that: where a module
    is used it is called again and again, and finds its weights in the caches and the cores awake. Copies run, in the
    mode that each module is in; the modules themselves, random states and threads stay as they are.

    Args:
        before: a module, or anything to be called.
        after: the one to hold against it.
        inputs: a tensor, a tuple of positional arguments, a dict of keyword ones, or `Inputs`.
        device: "cpu", "cuda" or "cuda:1".
        pairs: how many pairs to take, whatever time that needs; None goes on until the interval is tight or the
            budget is spent.
        budget_seconds: time for warm-up and pairs. A few calls are made even if they take longer.
        margin: the smallest change that counts, as a share: 0.02 is 2 %.
        threads: that torch runs meanwhile; None leaves them as they are.
        cold_cache: on a GPU, empty its L2 cache before each call.
        graph: on a GPU, time replays of a CUDA graph of each module, which leave out what launching costs.
        seed: of the order and of the resampling.
        progress: is told the share that is done, from 0 to 1.
        timer: the clock; None takes that of the device.

    Raises:
        EngineError: where the device is not there, a module raises, or no graph can be captured of it.
        ValueError: for less than one pair, a budget or margin that is not positive, or what only a GPU has.
    """
    how = _How(pairs, budget_seconds, margin, threads, cold_cache, graph, seed, progress, timer)
    return _in_rounds(before, {"after": after}, inputs, device, how)["after"]


def compare_all(
    before: Callable[..., Any],
    afters: Mapping[str, Callable[..., Any]],
    inputs: Any,
    device: torch.device | str = "cpu",
    *,
    budget_seconds: float = 10.0,
    seed: int = 0,
    timer: Timer | None = None,
) -> dict[str, Comparison]:
    """Compare several modules with one, as `compare` does, and all in the same rounds.

    So the one is timed once for all of them, and two of the others may be held against each other: equal positions of
    their times are of one round.

    Args:
        afters: by the names that errors and results call them; neither "before" nor "again" is free.

    Raises:
        EngineError: as `compare`.
        ValueError: as `compare`, and for a name that is not free.
    """
    if taken := afters.keys() & {"again", "before"}:
        raise ValueError(f"compare_all: what is held against 'before' has another name, got {sorted(taken)}")
    return _in_rounds(before, afters, inputs, device, _How(budget_seconds=budget_seconds, seed=seed, timer=timer))


@dataclass(frozen=True)
class _How:
    """What `compare` is told beside what to compare."""

    pairs: int | None = None
    budget_seconds: float = 10.0
    margin: float = 0.02
    threads: int | None = None
    cold_cache: bool = False
    graph: bool = False
    seed: int = 0
    progress: Progress | None = None
    timer: Timer | None = None

    def __post_init__(self) -> None:
        if (self.pairs is not None and self.pairs < 1) or self.budget_seconds <= 0 or self.margin <= 0:
            raise ValueError(
                "compare: pairs, budget_seconds and margin must be positive, got "
                f"{self.pairs}, {self.budget_seconds}, {self.margin}"
            )


def _in_rounds(
    before: Callable[..., Any],
    afters: Mapping[str, Callable[..., Any]],
    inputs: Any,
    device: torch.device | str,
    how: _How,
) -> dict[str, Comparison]:
    place = measurable(device)
    if (how.cold_cache or how.graph) and place.type != "cuda":
        raise ValueError(f"compare: cold_cache and graph are for a GPU, and the device is {str(place)!r}")
    given = Inputs.of(inputs)
    with quiet(place, how.threads):
        clock = how.timer or (CudaTimer(place, cold_cache=how.cold_cache) if place.type == "cuda" else CpuTimer())
        start = clock.now()
        # The copy goes first: its first call pays for what is set up once in a process, not once in a module.
        arms = {
            "again": Arm("before", before, given, place),
            "before": Arm("before", before, given, place),
            **{name: Arm(name, after, given, place) for name, after in afters.items()},
        }
        first = {name: _sample(arm, clock, 1).seconds for name, arm in arms.items()}
        # Inputs that a call writes into are put back before each, so then each is timed by itself.
        writes = any(arm.writes_inputs for arm in arms.values())
        for arm in arms.values() if writes else ():
            arm.keep_inputs(given)
        peaks = {name: _peak(arm, place) for name, arm in arms.items() if name != "again"}
        for arm in arms.values() if how.graph else ():
            arm.replay_graph()
        each = _warm_up(arms, clock, start, how.budget_seconds)
        calls = dict.fromkeys(arms, 1) if writes else timed_together({name: min(taken) for name, taken in each.items()})
        leads = (
            _leads(each, calls, how.budget_seconds) if place.type == "cpu" and not writes else dict.fromkeys(arms, 0)
        )
        samples = _take_pairs(arms, clock, start, how, calls, leads)
        seconds, had_threads = clock.now() - start, torch.get_num_threads()
    return {
        name: conclude(
            {"again": samples["again"], "before": samples["before"], "after": samples[name]},
            margin=how.margin,
            seed=how.seed,
            device=str(device),
            threads=had_threads,
            calls=max(calls["before"], calls[name]),
            first_call=BeforeAfter(first["before"], first[name]),
            peak_memory=BeforeAfter(peaks["before"], peaks[name]),
            seconds=seconds,
            notes=(*_limits("before", arms["before"]), *_limits(name, arms[name]), *clock.limits),
        )
        for name in afters
    }


def _sample(arm: Arm, timer: Timer, calls: int, lead: int = 0) -> Sample:
    """Time so many calls together, behind `lead` others."""

    def measure(call: Callable[[], object]) -> Sample:
        for _ in range(lead):
            call()
        return timer.time(call, calls)

    return arm.under(measure)


def _warm_up(arms: Mapping[str, Arm], timer: Timer, start: float, budget: float) -> dict[str, list[float]]:
    """Run all arms until their share of the budget is spent; the seconds of each call."""
    taken: dict[str, list[float]] = {name: [] for name in arms}
    while True:
        for name, arm in arms.items():
            taken[name].append(max(_sample(arm, timer, 1).seconds, TICK))
        if timer.now() - start > _WARM_UP * budget:
            return taken


def _leads(each: Mapping[str, Sequence[float]], calls: Mapping[str, int], budget: float) -> dict[str, int]:
    """How many calls go before those that are timed."""
    usual = {name: statistics.median(taken) for name, taken in each.items()}
    leads = {name: math.ceil(LEAD / seconds) if seconds < _LONG_CALL else 0 for name, seconds in usual.items()}
    a_round = sum((calls[name] + leads[name]) * seconds for name, seconds in usual.items())
    # Where the budget is short, more pairs tell more.
    return leads if _ENOUGH_PAIRS * a_round < budget else dict.fromkeys(each, 0)


def _take_pairs(
    arms: Mapping[str, Arm],
    timer: Timer,
    start: float,
    how: _How,
    calls: Mapping[str, int],
    leads: Mapping[str, int],
) -> dict[str, list[Sample]]:
    order_of = random.Random(how.seed)
    samples: dict[str, list[Sample]] = {name: [] for name in arms}
    order = list(arms)
    count, next_look, rests = 0, _ENOUGH_PAIRS, True
    while True:
        if count % 2:
            order.reverse()
        else:
            order_of.shuffle(order)
        for name in order:
            rests = rests and wait_until_idle()
            samples[name].append(_sample(arms[name], timer, calls[name], leads[name]))
        count += 1
        spent = (timer.now() - start) / how.budget_seconds
        if how.progress is not None:
            how.progress(min(1.0, count / how.pairs if how.pairs else max(spent, count / _MOST_PAIRS)))
        if how.pairs is not None:
            if count >= how.pairs:
                break
        elif count >= _MOST_PAIRS or spent >= (1 if count >= FEWEST_PAIRS else 3):
            break
        elif count >= next_look:
            # Looks grow rare: the rule is by width, not by verdict, but each look still is one more draw.
            next_look = count + count // 2
            if _is_tight(samples, how.margin, how.seed):
                break
    if how.progress is not None:
        how.progress(1.0)
    return samples


def _is_tight(samples: Mapping[str, Sequence[Sample]], margin: float, seed: int) -> bool:
    times = {name: [sample.seconds for sample in taken] for name, taken in samples.items()}
    return all(
        paired_interval(times["before"], times[other], seed=seed, resamples=300).width < margin / 2
        for other in times.keys() - {"before"}
    )


def _peak(arm: Arm, device: torch.device) -> int | None:
    # On the CPU only torch's own operators are seen: the memory of another engine would read as none.
    if device.type == "cpu" and not isinstance(arm.module, torch.nn.Module):
        return None
    return arm.watched(lambda call: peak_memory(call, device))


def _limits(name: str, arm: Arm) -> tuple[str, ...]:
    if arm.copied:
        return ()
    return (f"{name!r} ({arm.kind}) cannot be copied: it ran itself, beside no copy with memory of its own",)
