from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from fxopt.bench.statistics import Interval, Verdict, block_length, judge, paired_interval

QUIET = Interval(1.001, 0.998, 1.004)
NOISY = Interval(1.01, 0.96, 1.06)


def around(ratio: float, spread: float = 0.005) -> Interval:
    return Interval(ratio, ratio * (1 - spread), ratio * (1 + spread))


@pytest.mark.parametrize(
    ("effect", "noise", "facts", "verdict"),
    [
        pytest.param(around(0.8), QUIET, {}, Verdict.FASTER, id="clearly faster"),
        pytest.param(around(1.2), QUIET, {}, Verdict.SLOWER, id="clearly slower"),
        pytest.param(around(1.0), QUIET, {}, Verdict.EQUIVALENT, id="equal"),
        pytest.param(around(0.99), QUIET, {}, Verdict.EQUIVALENT, id="a real change inside the margin"),
        pytest.param(around(0.981), QUIET, {}, Verdict.INCONCLUSIVE, id="across the margin"),
        pytest.param(around(0.95), NOISY, {}, Verdict.INCONCLUSIVE, id="equal modules differ as much"),
        pytest.param(around(1.05), NOISY, {}, Verdict.INCONCLUSIVE, id="slower by no more than the noise"),
        pytest.param(around(0.5), NOISY, {}, Verdict.FASTER, id="faster by far more than the noise"),
        pytest.param(around(1.0), NOISY, {}, Verdict.INCONCLUSIVE, id="equal, as far as noise lets see"),
        pytest.param(around(0.9, 0.15), QUIET, {}, Verdict.INCONCLUSIVE, id="the interval holds 1"),
        pytest.param(
            around(0.9), QUIET, {"halves": (0.8, 1.0)}, Verdict.INCONCLUSIVE, id="only the first half shows it"
        ),
        pytest.param(
            around(1.1), QUIET, {"halves": (1.01, 1.2)}, Verdict.INCONCLUSIVE, id="only the second half shows it"
        ),
        pytest.param(around(0.5), QUIET, {"pairs": 5}, Verdict.INCONCLUSIVE, id="too few pairs to say"),
        pytest.param(around(0.92), NOISY, {"preempted": 0.1}, Verdict.FASTER, id="more than the noise"),
        pytest.param(
            around(0.92), NOISY, {"preempted": 0.7}, Verdict.INCONCLUSIVE, id="not twice the noise, preempted"
        ),
        pytest.param(around(0.8), NOISY, {"preempted": 0.7}, Verdict.FASTER, id="twice the noise, preempted"),
    ],
)
def test_verdict(effect: Interval, noise: Interval, facts: dict[str, object], verdict: Verdict) -> None:
    defaults = {"halves": (effect.ratio, effect.ratio), "pairs": 200, "preempted": 0.0, "margin": 0.02}
    judgement = judge(effect, noise, **(defaults | facts))  # type: ignore[arg-type]
    assert judgement.verdict is verdict
    assert judgement.noise_floor == pytest.approx(noise.reach)
    assert bool(judgement.notes) == (verdict is Verdict.INCONCLUSIVE)


@pytest.mark.parametrize(
    ("effect", "noise", "facts", "advice"),
    [
        (
            around(0.5),
            QUIET,
            {"pairs": 3},
            "only 3 pairs fitted into the budget, 6 are the least: raise it, by `--budget` or `budget_seconds`",
        ),
        (around(1.0), NOISY, {}, "equal modules differ by up to 6.0 % here, more than the margin of 2.0 %"),
        (around(1.0, 0.03), QUIET, {}, "the interval is 6.0 % wide, the margin 2.0 %: more pairs would help"),
        (around(0.981), QUIET, {}, "the difference is about as large as the margin of 2.0 %"),
        (around(1.0), NOISY, {"preempted": 0.64, "threads": 2}, "64.0 % of the pairs were preempted: fewer threads or"),
        (around(1.0), NOISY, {"preempted": 0.64, "threads": 1}, "64.0 % of the pairs were preempted: a quiet machine"),
    ],
)
def test_inconclusive_says_what_would_help(
    effect: Interval, noise: Interval, facts: dict[str, object], advice: str
) -> None:
    defaults = {"halves": (effect.ratio, effect.ratio), "pairs": 200, "preempted": None, "margin": 0.02}
    judgement = judge(effect, noise, **(defaults | facts))  # type: ignore[arg-type]
    assert judgement.verdict is Verdict.INCONCLUSIVE
    assert any(note.startswith(advice) for note in judgement.notes), judgement.notes


def drifting(rng: np.random.Generator, count: int, correlation: float) -> npt.NDArray[np.float64]:
    """An AR(1) series around 0 of deviation 1."""
    values = np.empty(count)
    values[0] = rng.standard_normal()
    for index in range(1, count):
        step = rng.standard_normal() * (1 - correlation**2) ** 0.5
        values[index] = correlation * values[index - 1] + step
    return values


@pytest.mark.parametrize(("correlation", "least"), [(0.0, 0.93), (0.5, 0.88), (0.8, 0.82)])
def test_interval_covers_the_truth_though_neighbours_agree(correlation: float, least: float) -> None:
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(200):
        noise = np.exp(0.05 * drifting(rng, 200, correlation))
        interval = paired_interval(np.ones(200), 0.9 * noise, seed=trial, resamples=200)
        hits += interval.low <= 0.9 <= interval.high
    assert hits / 200 >= least


def test_blocks_grow_with_correlation() -> None:
    rng = np.random.default_rng(1)
    lengths = [block_length(drifting(rng, 500, correlation)) for correlation in (0.0, 0.5, 0.9)]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1] <= 500 // 3


@pytest.mark.parametrize("count", [1, 2, 5, 6, 30, 999, 1000, 2000])
def test_interval_holds_its_ratio(count: int) -> None:
    rng = np.random.default_rng(count)
    before, after = np.exp(0.1 * rng.standard_normal((2, count)))
    interval = paired_interval(before, after)
    assert interval.low <= interval.ratio <= interval.high
    assert interval == paired_interval(before, after)


def test_few_pairs_give_their_extremes() -> None:
    interval = paired_interval([1.0] * 5, [0.5, 0.6, 0.7, 0.8, 0.9])
    assert (interval.low, interval.ratio, interval.high) == pytest.approx((0.5, 0.7, 0.9))


def test_equal_times_have_no_width() -> None:
    interval = paired_interval([0.25] * 40, [0.25] * 40)
    assert (interval.low, interval.ratio, interval.high) == (1, 1, 1)
    assert interval.reach == interval.width == 0


def test_one_stalled_call_does_not_move_the_ratio() -> None:
    after = [0.9] * 50
    after[10] = 100.0
    assert paired_interval([1.0] * 50, after).ratio == pytest.approx(0.9)
