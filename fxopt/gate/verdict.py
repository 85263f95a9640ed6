"""What windows of paired times say of a change."""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence

from fxopt.bench.statistics import FEWEST_PAIRS
from fxopt.gate.window import Window, joined

_SAME_CLOCK = 0.01


class GateVerdict(str, enum.Enum):
    """What a gate found of the latency."""

    OK = "OK"
    FASTER = "FASTER"
    REGRESSION = "REGRESSION"
    INCONCLUSIVE = "INCONCLUSIVE"

    def __str__(self) -> str:
        return self.value


def is_suspicious(window: Window, threshold: float) -> bool:
    """Whether a window by itself speaks for a slow-down: beyond the threshold, the interval, and the noise."""
    if len(window.times("base")) < FEWEST_PAIRS:
        return False
    effect = window.effect
    return effect.ratio > 1 + threshold and effect.low > 1 and effect.ratio - 1 > window.noise.reach


def wants_another(windows: Sequence[Window], threshold: float, most: int = 3) -> bool:
    """Whether one more window could settle it.

    A suspicion has to be seen twice, and what neither speaks for nor against a slow-down gets another look.
    """
    verdict = judge_windows(windows, threshold)
    settled = verdict in (GateVerdict.OK, GateVerdict.FASTER, GateVerdict.REGRESSION)
    return not settled and len(windows) < most


def judge_windows(windows: Sequence[Window], threshold: float) -> GateVerdict:
    """Decide.

    REGRESSION: two windows are suspicious, and all of them together. OK: the whole interval lies below the threshold,
    and so does the noise. FASTER: OK, with a ratio beyond the threshold on the other side. Else INCONCLUSIVE.
    """
    everything = joined(windows)
    if clocks_differ(everything) or len(everything.times("base")) < FEWEST_PAIRS:
        return GateVerdict.INCONCLUSIVE
    suspicious = sum(is_suspicious(window, threshold) for window in windows)
    if suspicious >= 2 and is_suspicious(everything, threshold):
        return GateVerdict.REGRESSION
    effect, noise = everything.effect, everything.noise
    if suspicious == 0 or len(windows) > 2:
        if effect.high < 1 and 1 / effect.ratio - 1 > max(threshold, noise.reach):
            return GateVerdict.FASTER
        if effect.high < 1 + threshold and noise.reach <= threshold:
            return GateVerdict.OK
    return GateVerdict.INCONCLUSIVE


def clocks_differ(window: Window) -> bool:
    """Whether the GPU ran the two sides at clocks that are too far apart."""
    clocks = window.clocks
    return clocks is not None and abs(math.log(clocks["head"] / clocks["base"])) > math.log1p(_SAME_CLOCK)


def advice(window: Window, threshold: float, threads: int) -> list[str]:
    """What would help where it is inconclusive."""
    notes = []
    effect, noise = window.effect, window.noise
    if clocks_differ(window):
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
    if (window.preempted or 0) > 0.3:
        fewer = "fewer --threads or " if threads > 1 else ""
        notes.append(
            f"{100 * (window.preempted or 0):.0f} % of the pairs were preempted: {fewer}a quiet machine would help"
        )
    return notes
