"""Whether the machine itself grew faster or slower while it measured: the clock of a CPU follows load and heat."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

_PARTS = 4
_FEWEST = 6
"""Times in a part of which the median means something."""
_RESTLESS = 0.15
"""Share by which the medians of two parts may differ."""


def drift_notes(times: Sequence[float]) -> list[str]:
    """What to know of times of equal work, in the order in which they were taken; nothing where all parts are alike.

    Most virtual machines do not tell the clock of a core, and where they do it is not all that changes its speed: a
    neighbour on the same core does, too. Equal work tells of both.
    """
    size = len(times) // _PARTS
    if size < _FEWEST:
        return []
    medians = [statistics.median(times[part * size : (part + 1) * size]) for part in range(_PARTS)]
    drift = max(medians) / min(medians) - 1
    if drift <= _RESTLESS:
        return []
    return [
        f"the machine's speed changed meanwhile: the medians of four parts of the run differ by {100 * drift:.0f} %; "
        "other work, or a clock that follows the temperature, does that"
    ]
