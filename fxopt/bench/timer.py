"""The clock of the CPU, and what every clock must offer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from fxopt.bench.clocks import Clocks

try:
    import resource
except ImportError:  # Windows has none.
    resource = None  # type: ignore[assignment]


SHORTEST_SAMPLE = 4e-3
"""Seconds: shorter calls are timed several at once. The clock takes a moment, and threads that are woken up another,
which must not be most of what is timed."""
TICK = 1e-6
"""Seconds: no call is taken for shorter."""
_LONGEST_SAMPLE = 0.1
"""Seconds, where short calls of one side are timed together and one of another side is many times as long."""
LEAD = 20e-3
"""Seconds of calls before those that are timed, on a CPU. After a rest of 30 ms, which alone empties no cache, calls of
a model for matrix units (AMX) took 8.0, 6.6, 6.1, 5.9, 5.8, 5.6, 5.6 and 5.6 ms one after the other."""


@dataclass(frozen=True)
class Sample:
    """The time of one call.

    Attributes:
        seconds: mean over the calls that were timed together; on a GPU, of the GPU.
        preempted: whether the system took the CPU away meanwhile; None where that is not known.
        wall: wall time in seconds from the call until the GPU is done; None on the CPU, where it is the same.
        clocks: of the GPU meanwhile; None where they are not known.
    """

    seconds: float
    preempted: bool | None = None
    wall: float | None = None
    clocks: Clocks | None = None


class Timer(Protocol):
    """A clock for calls.

    Attributes:
        limits: what it can't tell on this machine, and what would help.
    """

    limits: tuple[str, ...]

    def time(self, call: Callable[[], object], calls: int) -> Sample:
        """Make so many calls, one after the other, and time them together."""

    def now(self) -> float:
        """Seconds since any fixed moment, by which budgets are kept."""


def timed_together(seconds: Mapping[str, float]) -> dict[str, int]:
    """How many calls of each side are timed together: as many of all, for means of one kind, but where that takes long.

    Args:
        seconds: of one call of each side; by the clock of a GPU it may have taken none.
    """
    seconds = {side: max(one, TICK) for side, one in seconds.items()}
    together = math.ceil(SHORTEST_SAMPLE / min(seconds.values()))
    return {
        side: together if together * one < _LONGEST_SAMPLE else math.ceil(SHORTEST_SAMPLE / one)
        for side, one in seconds.items()
    }


class CpuTimer:
    """Wall time by the monotonic clock, with involuntary context switches as an alarm."""

    limits: tuple[str, ...] = ()

    def time(self, call: Callable[[], object], calls: int) -> Sample:
        """Time so many calls together."""
        switches = _involuntary_switches()
        start = time.perf_counter_ns()
        for _ in range(calls):
            call()
        elapsed = time.perf_counter_ns() - start
        return Sample(elapsed / calls / 1e9, None if switches is None else _involuntary_switches() != switches)

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.perf_counter()


def _involuntary_switches() -> int | None:
    """How often the system took a core from any thread of ours."""
    return None if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
