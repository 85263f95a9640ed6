"""What a comparison of two modules found: frozen, with the raw times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from fxopt.bench.clocks import Clocks
from fxopt.bench.statistics import Verdict

T = TypeVar("T")


@dataclass(frozen=True)
class BeforeAfter(Generic[T]):
    """One fact about each side."""

    before: T
    after: T


@dataclass(frozen=True)
class Times:
    """Raw times in seconds a call; equal positions were taken right after each other.

    Attributes:
        before: of the module before.
        after: of the module after.
        again: of a copy of the module before: what differs between these and `before` is noise.
    """

    before: tuple[float, ...]
    after: tuple[float, ...]
    again: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class Comparison:
    """The latency of two modules, measured in turns.

    Attributes:
        verdict: faster, slower, equivalent or inconclusive.
        ratio: median of the paired ratios of times, after over before: below 1 is faster.
        low: lower end of its 95 % interval.
        high: upper end.
        noise_floor: the largest effect, as a share of the time, that the same measurement could not rule out
            between two copies of the module before (0.01 is 1 %).
        margin: the smallest change that counts, as a share.
        before_ms: median time in milliseconds of a call of the module before.
        after_ms: and after.
        device: where it ran.
        threads: that torch ran on the CPU.
        pairs: how many pairs of times were taken.
        calls: how many calls each time is the mean of; of a side with far longer calls it is fewer.
        preempted: share of the pairs in which the system took a core away; None where that is not counted.
        times: raw times in seconds a call.
        first_call: seconds of the very first call of each.
        peak_memory: bytes that a call holds at its peak beyond weights and inputs; None where not measurable.
        wall_ms: median wall time in milliseconds until the GPU was done; None on the CPU, where it is the time.
        clocks: of the GPU while each was timed; None on the CPU, and where they can't be read.
        seconds: that the whole comparison took.
        notes: what would help, where it is inconclusive, and what else limits it.
    """

    verdict: Verdict
    ratio: float
    low: float
    high: float
    noise_floor: float
    margin: float
    before_ms: float
    after_ms: float
    device: str
    threads: int
    pairs: int
    calls: int
    preempted: float | None
    times: Times
    first_call: BeforeAfter[float]
    peak_memory: BeforeAfter[int | None]
    wall_ms: BeforeAfter[float] | None = None
    clocks: BeforeAfter[Clocks] | None = None
    seconds: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def speedup(self) -> float:
        """How many times as fast the module after is: 1 / ratio."""
        return 1 / self.ratio

    def __repr__(self) -> str:
        interval = f"[{1 / self.high:.2f}, {1 / self.low:.2f}]"
        return (
            f"{self.verdict} on {self.device}: {self.before_ms:.3g} -> {self.after_ms:.3g} ms, "
            f"speed-up {self.speedup:.2f} {interval}, noise floor {100 * self.noise_floor:.1f} %, {self.pairs} pairs"
        )
