"""What paired times say: a ratio, its interval, and a verdict that knows how noisy the machine was."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fxopt.bench.clocks import Clocks, clocks_differ

FEWEST_PAIRS = 6
"""Fewer pairs carry no 95 % statement: even if all agree, chance does that once in 2 ** (pairs - 1)."""

_CROWDED = 0.3
"""Share of times with an interruption from which on that is worth a word."""


class Verdict(enum.StrEnum):
    """What a comparison found."""

    FASTER = "faster"
    SLOWER = "slower"
    EQUIVALENT = "equivalent"
    """The whole interval lies inside the margin."""
    INCONCLUSIVE = "inconclusive"
    """The noise is larger than what was to be seen."""


@dataclass(frozen=True)
class Interval:
    """A ratio of times and where it lies with 95 % confidence; 1 is no difference, below 1 is faster."""

    ratio: float
    low: float
    high: float

    @property
    def reach(self) -> float:
        """The largest effect inside the interval, whichever its sign: 0.03 for [0.99, 1.03]."""
        return math.exp(max(abs(math.log(self.low)), abs(math.log(self.high)))) - 1

    @property
    def width(self) -> float:
        """The log of high / low, which is nearly the width in shares."""
        return math.log(self.high / self.low)


def paired_interval(
    before: Sequence[float], after: Sequence[float], *, seed: int = 0, resamples: int = 1000
) -> Interval:
    """The median of the paired ratios after / before, with its 95 % interval.

    Log-ratios are resampled in blocks, since neighbours in time share their disturbances and would
    otherwise count as independent evidence. The interval is never narrower than that of the sign test,
    which needs no resampling and so holds for few pairs.

    Args:
        before: times, in any unit.
        after: the times paired with them, in the same order as they were taken.
        seed: of the resampling, by a generator of its own.
        resamples: how many; 1000 settles the ends of the interval to a few percent of its width.
    """
    logs = np.log(np.asarray(after, dtype=np.float64)) - np.log(np.asarray(before, dtype=np.float64))
    medians = np.median(_block_resamples(logs, resamples, np.random.default_rng(seed)), axis=1)
    low, high = np.quantile(medians, (0.025, 0.975))
    sign_low, sign_high = _sign_interval(logs)
    return Interval(
        ratio=math.exp(float(np.median(logs))),
        low=math.exp(min(float(low), sign_low)),
        high=math.exp(max(float(high), sign_high)),
    )


def median_interval(times: Sequence[float]) -> tuple[float, float]:
    """The order statistics between which the median lies with at least 95 %, whatever the distribution."""
    return _sign_interval(np.asarray(times, dtype=np.float64))


def _block_resamples(
    values: npt.NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    """Resamples of a series, a row each, made of blocks of neighbours; the series is closed to a ring."""
    count = len(values)
    length = block_length(values)
    blocks = math.ceil(count / length)
    starts = rng.integers(0, count, size=(resamples, blocks))
    positions = (starts[:, :, None] + np.arange(length)) % count
    resampled: npt.NDArray[np.float64] = values[positions.reshape(resamples, -1)[:, :count]]
    return resampled


def block_length(values: npt.NDArray[np.float64]) -> int:
    """How many neighbours stay together: the best length for a series with this lag-1 correlation.

    Source: Carlstein 1986, with the constant of overlapping blocks (Künsch 1989):
    (6 ** 0.5 * r / (1 - r ** 2)) ** (2/3) * n ** (1/3) for an AR(1) series; at least n ** (1/3).
    """
    count = len(values)
    if count < FEWEST_PAIRS:
        return 1
    # Ranks rather than values: one stalled call must not hide the correlation of all the others.
    ranks = np.argsort(np.argsort(values)).astype(np.float64)
    ranks -= ranks.mean()
    correlation = float(ranks[1:] @ ranks[:-1] / (ranks @ ranks))
    correlation = min(max(correlation, 0.0), 0.95)
    best = (6**0.5 * correlation / (1 - correlation**2)) ** (2 / 3) * count ** (1 / 3)
    wanted: float = max(best, count ** (1 / 3))
    return min(math.ceil(wanted), count // 3)


def _sign_interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    """The order statistics that hold the median with at least 95 %; the extremes where there are too few."""
    ordered = np.sort(values)
    count = len(ordered)
    tail, skipped = 0.5**count if count < 1000 else 0.0, 0
    if count >= 1000:
        # The binomial is normal to four digits by now, and its exact tail underflows.
        skipped = max(int(count / 2 - 0.98 * math.sqrt(count)), 0)
    else:
        probability = tail
        while skipped < (count - 1) // 2:
            probability *= (count - skipped) / (skipped + 1)
            if tail + probability > 0.025:
                break
            tail += probability
            skipped += 1
        # `skipped` order statistics may go from each end: their tail holds at most 2.5 %.
    return float(ordered[skipped]), float(ordered[count - 1 - skipped])


@dataclass(frozen=True)
class Judgement:
    """A verdict, the noise it was held against, and what would help where it is inconclusive."""

    verdict: Verdict
    noise_floor: float
    notes: tuple[str, ...] = ()


def judge(
    effect: Interval,
    noise: Interval,
    halves: Sequence[float],
    *,
    pairs: int,
    preempted: float | None,
    margin: float,
    threads: int = 1,
) -> Judgement:
    """Decide what an effect means, given what the same measurement saw between equal modules.

    Faster or slower needs all of: an interval on one side of 1, a ratio farther from 1 than both the margin
    and the noise floor (twice the floor where most pairs were preempted), and both halves of the pairs beyond
    the margin on that side. Equivalent needs the interval and the noise inside of the margin.

    Args:
        effect: after over before.
        noise: a copy of before over before. Its reach is the noise floor.
        halves: ratios of the first and of the second half of the pairs.
        pairs: how many pairs there are.
        preempted: share of pairs that the system interrupted, None where it was not counted.
        margin: the smallest change that counts, 0.02 for 2 %.
        threads: that torch ran, for the advice.
    """
    floor = noise.reach
    crowded = preempted is not None and preempted > 0.5
    needed = math.log1p(max(margin, 2 * floor if crowded else floor))
    least = math.log1p(margin)
    size = math.log(effect.ratio)
    verdict = Verdict.INCONCLUSIVE
    if pairs >= FEWEST_PAIRS:
        if size < -needed and effect.high < 1 and all(math.log(half) < -least for half in halves):
            verdict = Verdict.FASTER
        elif size > needed and effect.low > 1 and all(math.log(half) > least for half in halves):
            verdict = Verdict.SLOWER
        elif effect.reach <= margin and floor <= margin:
            verdict = Verdict.EQUIVALENT
    if verdict is not Verdict.INCONCLUSIVE:
        return Judgement(verdict, floor)
    return Judgement(verdict, floor, tuple(_advice(effect, floor, pairs, preempted, margin, threads)))


def hold_clocks(judgement: Judgement, before: Clocks, after: Clocks) -> Judgement:
    """The judgement, or none where the GPU did not run both sides at the same clock."""
    notes = list(judgement.notes)
    for name, clocks in (("before", before), ("after", after)):
        if clocks.throttled:
            notes.append(f"the GPU was held back while {name!r} ran: {', '.join(clocks.throttled)}")
    verdict = judgement.verdict
    if clocks_differ(before.sm_mhz, after.sm_mhz):
        verdict = Verdict.INCONCLUSIVE
        notes.append(
            f"the GPU ran at {before.sm_mhz:.0f} MHz before and {after.sm_mhz:.0f} MHz after, too far apart to be "
            "compared: `nvidia-smi --lock-gpu-clocks` holds it still"
        )
    return Judgement(verdict, judgement.noise_floor, tuple(notes))


def _advice(
    effect: Interval, floor: float, pairs: int, preempted: float | None, margin: float, threads: int
) -> list[str]:
    notes = []
    if pairs < FEWEST_PAIRS:
        notes.append(
            f"only {pairs} pairs fitted into the budget, {FEWEST_PAIRS} are the least: raise it, by `--budget` or "
            "`budget_seconds`"
        )
    elif floor > margin:
        notes.append(
            f"equal modules differ by up to {_percent(floor)} here, more than the margin of {_percent(margin)}: "
            "more pairs or a quiet machine would help"
        )
    elif effect.width > margin:
        notes.append(
            f"the interval is {_percent(effect.width)} wide, the margin {_percent(margin)}: more pairs would help"
        )
    else:
        notes.append(
            f"the difference is about as large as the margin of {_percent(margin)}: a smaller margin would tell"
        )
    return [*notes, *preemption_notes(preempted, "pairs", threads)]


def preemption_notes(preempted: float | None, what: str, threads: int) -> list[str]:
    """What to do where the system took a core away in many of the pairs, or calls."""
    if preempted is None or preempted <= _CROWDED:
        return []
    fewer = "fewer threads or " if threads > 1 else ""
    return [f"{_percent(preempted)} of the {what} were preempted: {fewer}a quiet machine would help"]


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
