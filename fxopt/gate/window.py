"""The base and the head timed in turns by processes of their own, several of each, with a second base for the noise."""

from __future__ import annotations

import functools
import math
import os
import random
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fxopt.bench.statistics import FEWEST_PAIRS, Interval, paired_interval
from fxopt.bench.timer import timed_together
from fxopt.errors import GateError
from fxopt.gate.processes import Worker

_ROUNDS = 3
"""Processes of each side in one window: where memory lies in a process shifts its speed by some percent."""
_ENOUGH = 20
_MOST = 200
"""Pairs in one round."""

Start = Callable[[], Worker]


@dataclass
class Round:
    """The times in seconds of three processes; equal positions were taken right after each other."""

    base: list[float] = field(default_factory=list)
    head: list[float] = field(default_factory=list)
    again: list[float] = field(default_factory=list)
    preempted: int = 0
    counted: bool = True
    mhz: dict[str, list[float]] = field(default_factory=lambda: {"base": [], "head": [], "again": []})


@dataclass(frozen=True)
class Window:
    """All that was timed within one stretch of time.

    Attributes:
        rounds: each with processes of its own.
        calls: that each time is the mean of; of a side with far longer calls it is fewer.
        seconds: of the whole window, starting its processes included.
        measuring: seconds of it in which a side ran what was timed.
    """

    rounds: tuple[Round, ...]
    calls: int
    seconds: float
    measuring: float

    def times(self, name: str) -> list[float]:
        """Of "base", "head" or "again", in order."""
        return [one for taken in self.rounds for one in getattr(taken, name)]

    @functools.cached_property
    def effect(self) -> Interval:
        """Head over base."""
        return paired_interval(self.times("base"), self.times("head"))

    @functools.cached_property
    def noise(self) -> Interval:
        """Base over base."""
        return paired_interval(self.times("base"), self.times("again"))

    @property
    def preempted(self) -> float | None:
        """Share of the pairs that the system interrupted; None where that is not counted."""
        if not all(taken.counted for taken in self.rounds):
            return None
        return sum(taken.preempted for taken in self.rounds) / max(1, len(self.times("base")))

    @property
    def clocks(self) -> dict[str, float] | None:
        """Median clock of the GPU in MHz by side; None where it is not known."""
        found = {name: [mhz for taken in self.rounds for mhz in taken.mhz[name]] for name in ("base", "head")}
        return {name: statistics.median(mhz) for name, mhz in found.items()} if all(found.values()) else None


def joined(windows: Sequence[Window]) -> Window:
    """All windows as one."""
    rounds = tuple(taken for window in windows for taken in window.rounds)
    seconds, measuring = sum(one.seconds for one in windows), sum(one.measuring for one in windows)
    return Window(rounds, windows[0].calls, seconds, measuring)


def is_tight(so_far: Window, tight: float) -> bool:
    """Whether further rounds would tell nothing new: several processes were seen, and the intervals are narrow."""
    enough = len(so_far.rounds) > 1 and len(so_far.rounds[-1].base) >= _ENOUGH
    return enough and max(so_far.effect.width, so_far.noise.width) < tight / 2


def take_window(
    starts: Mapping[str, Start], *, budget: float, tight: float, seed: int = 0, rounds: int = _ROUNDS
) -> Window:
    """Time the sides.

    Args:
        starts: of "base" and "head": starts a process that has built that side.
        budget: seconds to spend on pairs. A few are taken even if they take longer.
        tight: a log-width of the interval below which no more pairs are taken.
        seed: of the order.
        rounds: how many processes of each side.

    Raises:
        GateError: where even a few pairs take several times the budget.
    """
    began, order_of, taken, measuring = time.perf_counter(), random.Random(seed), [], 0.0
    calls: dict[str, int] = {}
    for number in range(rounds):
        workers: dict[str, Worker] = {}
        try:
            names = ["base", "head", "again"]
            order_of.shuffle(names)
            for name in names:
                workers[name] = starts["base" if name == "again" else name]()
            core = shared_core(workers.values(), order_of)
            for worker in workers.values():
                worker.begin("warm", cores=core)
            writes = [worker.answer() for worker in workers.values()]
            each = {name: float(worker.ask("time", calls=1)["seconds"]) for name, worker in workers.items()}
            _refuse_slow(each, (rounds - number) * math.ceil(FEWEST_PAIRS / rounds), budget)
            if not calls:
                calls = dict.fromkeys(names, 1) if any(writes) else _together(each)
            until = time.perf_counter() + budget / rounds
            found = Round()
            taken.append(found)
            measuring += _take_round(workers, found, names, order_of, calls, until, rounds)
        finally:
            for worker in workers.values():
                worker.close()
        if is_tight(Window(tuple(taken), max(calls.values()), 0.0, 0.0), tight):
            break
    return Window(tuple(taken), max(calls.values()), time.perf_counter() - began, measuring)


def shared_core(workers: Collection[Worker], order_of: random.Random) -> list[int] | None:
    """One core for all, drawn anew for each round; None where a side runs several threads, or on a GPU.

    Left to the system, processes stay each on a core of its own, and where a core shares its units with other work, as
    on a virtual machine, one is slower than the next by a tenth and more for as long as that lasts.
    """
    single = all(worker.order["threads"] == 1 and worker.order["device"] == "cpu" for worker in workers)
    if not single or not hasattr(os, "sched_getaffinity"):
        return None
    return [order_of.choice(sorted(os.sched_getaffinity(0)))]


def _together(each: Mapping[str, float]) -> dict[str, int]:
    """How many calls of each are timed together: as many of the second base as of the first."""
    base = min(each["base"], each["again"])
    return timed_together({"base": base, "head": each["head"], "again": base})


def _take_round(
    workers: Mapping[str, Worker],
    found: Round,
    names: list[str],
    order_of: random.Random,
    calls: Mapping[str, int],
    until: float,
    rounds: int,
) -> float:
    measuring = 0.0
    while len(found.base) < _MOST:
        if len(found.base) % 2:
            names.reverse()
        else:
            order_of.shuffle(names)
        samples: dict[str, dict[str, Any]] = {name: workers[name].ask("time", calls=calls[name]) for name in names}
        for name, sample in samples.items():
            getattr(found, name).append(sample["seconds"])
            measuring += calls[name] * sample["seconds"]
            if sample["mhz"] is not None:
                found.mhz[name].append(sample["mhz"])
        flags = [samples["base"]["preempted"], samples["head"]["preempted"]]
        found.counted = found.counted and None not in flags
        found.preempted += any(flags)
        if time.perf_counter() > until and len(found.base) >= math.ceil(FEWEST_PAIRS / rounds):
            break
    return measuring


def _refuse_slow(each: Mapping[str, float], pairs: int, budget: float) -> None:
    needed = sum(each.values()) * pairs
    if needed > 3 * budget:
        raise GateError(
            f"the model is too slow for the budget: a call takes {1e3 * each['base']:.0f} ms in the base and "
            f"{1e3 * each['head']:.0f} ms in the head, so the fewest pairs that say anything take {needed:.0f} s, and "
            f"{budget:.1f} s are left for them; give --budget {math.ceil(needed / budget)} times as much, or a smaller "
            "input"
        )
