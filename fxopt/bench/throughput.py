"""How many samples a second a module gets through, by the size of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fxopt.bench.latency import FEWEST_CALLS, measure_latency
from fxopt.errors import EngineError
from fxopt.inputs import Inputs

BATCHES = (1, 2, 4, 8, 16, 32)
_MOST_BUDGETS = 3
"""A batch size behind the first one is left out where the fewest calls of it would take so many times the budget."""


@dataclass(frozen=True)
class Throughput:
    """What a module gets through at one batch size.

    Attributes:
        batch: how many samples a call takes.
        per_second: samples a second, from the median time of a call.
        low: lower end of its 95 % interval.
        high: upper end.
        median_ms: milliseconds of a call.
        calls: that were timed.
    """

    batch: int
    per_second: float
    low: float
    high: float
    median_ms: float
    calls: int


def measure_throughput(
    module: Callable[..., Any],
    inputs: Any,
    device: torch.device | str = "cpu",
    *,
    batches: Sequence[int] = BATCHES,
    budget_seconds: float = 5.0,
    threads: int | None = None,
) -> dict[int, Throughput | str]:
    """Measure a module at several batch sizes, made by repeating the rows of its inputs.

    Args:
        module: in the mode that is to be measured.
        inputs: an example with the batch in dimension 0 of every tensor.
        device: "cpu", "cuda" or "cuda:1".
        batches: the sizes.
        budget_seconds: time to spend on all of them. The first one is measured even if it takes longer.
        threads: that torch runs meanwhile; None leaves them.

    Returns:
        What was found for each size, or why there is nothing.
    """
    found: dict[int, Throughput | str] = {}
    for batch in batches:
        resized = Inputs.of(inputs).with_batch(batch)
        if resized is None:
            found[batch] = "the inputs have no common batch in dimension 0"
            continue
        # As if a call took as long for each sample as in the batch before: it seldom takes longer.
        calls = 1 + FEWEST_CALLS
        seconds = calls * max((batch / one.per_second for one in _measured(found)[-1:]), default=0.0)
        if seconds > _MOST_BUDGETS * budget_seconds:
            found[batch] = (
                f"{calls} calls would take about {seconds:.0f} s: raise the budget, or ask for this size alone"
            )
            continue
        try:
            latency = measure_latency(
                module, resized, device, budget_seconds=budget_seconds / len(batches), threads=threads
            )
        except EngineError as error:
            found[batch] = str(error.__cause__ or error).partition("\n")[0]
            continue
        found[batch] = Throughput(
            batch=batch,
            per_second=1e3 * batch / latency.median_ms,
            low=1e3 * batch / latency.high_ms,
            high=1e3 * batch / latency.low_ms,
            median_ms=latency.median_ms,
            calls=len(latency.times),
        )
    return found


def _measured(found: dict[int, Throughput | str]) -> list[Throughput]:
    return [one for one in found.values() if isinstance(one, Throughput)]
