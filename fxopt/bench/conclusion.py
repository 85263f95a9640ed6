"""What the samples of two modules say, put together."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fxopt.bench.clocks import Clocks, median_clocks
from fxopt.bench.comparison import BeforeAfter, Comparison, Times
from fxopt.bench.drift import drift_notes
from fxopt.bench.statistics import hold_clocks, judge, paired_interval
from fxopt.bench.timer import Sample


def conclude(
    samples: Mapping[str, Sequence[Sample]],
    *,
    margin: float,
    seed: int,
    threads: int,
    notes: tuple[str, ...],
    **facts: Any,
) -> Comparison:
    """A verdict on `after`, with all that is known of the samples.

    Args:
        samples: of `before`, `after`, and of `again`, a copy of `before`; equal positions are of one round.
        margin: the smallest change that counts, as a share.
        seed: of the resampling.
        threads: that torch ran.
        notes: what limited the measurement.
        facts: the other attributes of `Comparison`.
    """
    times = Times(**{name: tuple(sample.seconds for sample in taken) for name, taken in samples.items()})
    pairs = len(times.before)
    effect = paired_interval(times.before, times.after, seed=seed)
    noise = paired_interval(times.before, times.again, seed=seed)
    half = pairs // 2
    halves = [_median_ratio(times, slice(0, half)), _median_ratio(times, slice(half, None))] if half else []
    flags = [one.preempted or two.preempted for one, two in zip(samples["before"], samples["after"], strict=True)]
    preempted = None if any(flag is None for flag in flags) else sum(map(bool, flags)) / pairs
    clocks = _clocks(samples)
    judgement = judge(effect, noise, halves, pairs=pairs, preempted=preempted, margin=margin, threads=threads)
    judgement = judgement if clocks is None else hold_clocks(judgement, clocks.before, clocks.after)
    return Comparison(
        verdict=judgement.verdict,
        ratio=effect.ratio,
        low=effect.low,
        high=effect.high,
        noise_floor=judgement.noise_floor,
        margin=margin,
        before_ms=1e3 * statistics.median(times.before),
        after_ms=1e3 * statistics.median(times.after),
        threads=threads,
        pairs=pairs,
        preempted=preempted,
        times=times,
        wall_ms=_walls(samples),
        clocks=clocks,
        notes=(*judgement.notes, *drift_notes(times.before), *notes),
        **facts,
    )


def _median_ratio(times: Times, part: slice) -> float:
    return statistics.median(
        after / before for before, after in zip(times.before[part], times.after[part], strict=True)
    )


def _clocks(samples: Mapping[str, Sequence[Sample]]) -> BeforeAfter[Clocks] | None:
    readings = {name: [one.clocks for one in taken if one.clocks is not None] for name, taken in samples.items()}
    if not readings["before"] or not readings["after"]:
        return None
    return BeforeAfter(median_clocks(readings["before"]), median_clocks(readings["after"]))


def _walls(samples: Mapping[str, Sequence[Sample]]) -> BeforeAfter[float] | None:
    medians = []
    for name in ("before", "after"):
        walls = [sample.wall for sample in samples[name] if sample.wall is not None]
        if not walls:
            return None
        medians.append(1e3 * statistics.median(walls))
    return BeforeAfter(*medians)
