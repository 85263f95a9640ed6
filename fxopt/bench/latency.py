"""The latency of one module: single calls, and as much of their distribution as they can tell."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.bench.arm import Arm
from fxopt.bench.clocks import Clocks, median_clocks
from fxopt.bench.cuda import CudaTimer
from fxopt.bench.device import measurable
from fxopt.bench.drift import drift_notes
from fxopt.bench.statistics import median_interval, preemption_notes
from fxopt.bench.surroundings import quiet
from fxopt.bench.timer import CpuTimer, Sample, Timer
from fxopt.inputs import Inputs

TAILS = {"p90": (0.90, 64), "p99": (0.99, 662)}
"""Percentiles by name, each with the fewest calls that can tell it."""

_MOST_CALLS = 5000
_WARM_UP = 0.1
FEWEST_CALLS = 6
"""Beside the first, which warms up."""


@dataclass(frozen=True)
class Latency:
    """The latency of one module on one device.

    Attributes:
        device: where it ran.
        threads: that torch ran on the CPU.
        median_ms: milliseconds that the median call takes.
        low_ms: lower end of its 95 % interval.
        high_ms: upper end.
        percentiles: milliseconds by name, "p90"; None where there are too few calls to tell.
        times: seconds of every call, in order.
        first_call: seconds of the very first one.
        preempted: share of the calls in which the system took a core away; None where that is not counted.
        wall_ms: median wall time in milliseconds until a GPU was done; None on the CPU, where it is the time.
        clocks: of the GPU meanwhile; None on the CPU, and where they can't be read.
        notes: what to know before these numbers are believed.
    """

    device: str
    threads: int
    median_ms: float
    low_ms: float
    high_ms: float
    percentiles: dict[str, float | None]
    times: tuple[float, ...]
    first_call: float
    preempted: float | None
    wall_ms: float | None = None
    clocks: Clocks | None = None
    notes: tuple[str, ...] = ()


def measure_latency(
    module: Callable[..., Any],
    inputs: Any,
    device: torch.device | str = "cpu",
    *,
    budget_seconds: float = 5.0,
    threads: int | None = None,
    timer: Timer | None = None,
) -> Latency:
    """Measure one module, on a copy of it.

    Args:
        module: in the mode that is to be measured.
        inputs: a tensor, a tuple of positional arguments, a dict of keyword ones, or `Inputs`.
        device: "cpu", "cuda" or "cuda:1".
        budget_seconds: time to spend. A few calls are made even if they take longer.
        threads: that torch runs meanwhile; None leaves them.
        timer: the clock; None takes that of the device.

    Raises:
        EngineError: where the device is not there, or the module raises.
    """
    place = measurable(device)
    given = Inputs.of(inputs)
    with quiet(place, threads):
        clock = timer or (CudaTimer(place) if place.type == "cuda" else CpuTimer())
        start = clock.now()
        arm = Arm("module", module, given, place)
        first = arm.under(lambda call: clock.time(call, 1))
        if arm.writes_inputs:
            arm.keep_inputs(given)
        while clock.now() - start < _WARM_UP * budget_seconds:
            arm.under(lambda call: clock.time(call, 1))
        samples: list[Sample] = []
        while len(samples) < _MOST_CALLS:
            samples.append(arm.under(lambda call: clock.time(call, 1)))
            if clock.now() - start > budget_seconds and len(samples) >= FEWEST_CALLS:
                break
        had_threads = torch.get_num_threads()
    times = tuple(sample.seconds for sample in samples)
    flags = [sample.preempted for sample in samples]
    preempted = None if None in flags else sum(map(bool, flags)) / len(flags)
    walls = [sample.wall for sample in samples if sample.wall is not None]
    clocks = [sample.clocks for sample in samples if sample.clocks is not None]
    low, high = median_interval(times)
    return Latency(
        device=str(device),
        threads=had_threads,
        median_ms=1e3 * statistics.median(times),
        low_ms=1e3 * low,
        high_ms=1e3 * high,
        percentiles={name: percentile(times, part, fewest) for name, (part, fewest) in TAILS.items()},
        times=times,
        first_call=first.seconds,
        preempted=preempted,
        wall_ms=1e3 * statistics.median(walls) if walls else None,
        clocks=median_clocks(clocks) if clocks else None,
        notes=(*preemption_notes(preempted, "calls", had_threads), *drift_notes(times), *clock.limits),
    )


def percentile(times: Sequence[float], part: float, fewest: int) -> float | None:
    """Milliseconds that this part of the calls stays within; None for less than the fewest calls."""
    if len(times) < fewest:
        return None
    return 1e3 * sorted(times)[math.ceil(part * len(times)) - 1]
