"""What windows of paired times say of a change."""

from __future__ import annotations

import enum
from collections.abc import Sequence

from fxopt.bench.clocks import clocks_differ
from fxopt.bench.drift import drift_notes
from fxopt.bench.statistics import FEWEST_PAIRS, preemption_notes
from fxopt.gate.window import Window, joined


class GateVerdict(enum.StrEnum):
    """What a gate found of the latency."""

    OK = "OK"
    FASTER = "FASTER"
    REGRESSION = "REGRESSION"
    INCONCLUSIVE = "INCONCLUSIVE"


def is_suspicious(window: Window, threshold: float) -> bool:
    """Whether a window by itself speaks for a slow-down: a ratio beyond the threshold, an interval beyond 1."""
    effect = window.effect
    return len(window.times("base")) >= FEWEST_PAIRS and effect.ratio > 1 + threshold and effect.low > 1


def is_promising(window: Window, threshold: float) -> bool:
    """Whether a window by itself speaks for a speed-up: as `is_suspicious`, the other way round."""
    effect = window.effect
    return len(window.times("base")) >= FEWEST_PAIRS and 1 / effect.ratio > 1 + threshold and effect.high < 1


def wants_another(windows: Sequence[Window], threshold: float, most: int = 3) -> bool:
    """Whether one more window could settle it.

    A difference has to be seen twice, and what neither speaks for nor against a slow-down gets another look.
    """
    return judge_windows(windows, threshold) is GateVerdict.INCONCLUSIVE and len(windows) < most


def judge_windows(windows: Sequence[Window], threshold: float) -> GateVerdict:
    """Decide.

    REGRESSION, FASTER: two windows speak for it, and all of them together, which show less between equal sides. OK: no
    window does, or it has had its other look, the whole interval lies below the threshold, and so does the noise. Else
    INCONCLUSIVE.
    """
    everything = joined(windows)
    if _at_other_clocks(everything) or len(everything.times("base")) < FEWEST_PAIRS:
        return GateVerdict.INCONCLUSIVE
    ratio = everything.effect.ratio
    beyond_noise, seen = max(ratio, 1 / ratio) - 1 > everything.noise.reach, 0
    for verdict, speaks in ((GateVerdict.REGRESSION, is_suspicious), (GateVerdict.FASTER, is_promising)):
        count = sum(speaks(window, threshold) for window in windows)
        if count >= 2 and speaks(everything, threshold) and beyond_noise:
            return verdict
        seen += count
    tight = everything.effect.high < 1 + threshold and everything.noise.reach <= threshold
    return GateVerdict.OK if tight and (seen == 0 or len(windows) > 2) else GateVerdict.INCONCLUSIVE


def advice(window: Window, threshold: float, threads: int) -> list[str]:
    """What would help where it is inconclusive."""
    notes = []
    effect, noise = window.effect, window.noise
    if _at_other_clocks(window):
        notes.append("the GPU ran the two sides at different clocks: `nvidia-smi --lock-gpu-clocks` holds it still")
    if noise.reach > threshold:
        notes.append(
            f"the base differs from itself by up to {100 * noise.reach:.1f} % here, more than the threshold of "
            f"{100 * threshold:.1f} %: a larger --budget or a quiet machine would help"
        )
    elif effect.width > threshold:
        notes.append(f"the interval is {100 * effect.width:.1f} % wide: a larger --budget would help")
    else:
        notes.append(f"the difference is about as large as the threshold of {100 * threshold:.1f} %")
    return [*notes, *preemption_notes(window.preempted, "pairs", threads), *drift_notes(window.times("base"))]


def _at_other_clocks(window: Window) -> bool:
    return window.clocks is not None and clocks_differ(window.clocks["base"], window.clocks["head"])
