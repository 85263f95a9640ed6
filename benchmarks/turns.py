"""Several arms in one process, timed in turns by blocks of calls."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from fxopt.bench.idle import wait_until_idle
from fxopt.bench.timer import LEAD, CpuTimer

Run = Callable[[], Any]
_FEWEST_ROUNDS = 8
_SHORTEST_BLOCK = 10e-3
"""Seconds."""


def in_turns(runs: Mapping[str, Run], seconds: float) -> dict[str, list[float]]:
    """Seconds a call of each arm, a block in each round; in an order drawn at random, and then in the reverse one.

    Threads of the arm before spin for a while, its data is in the caches, and cores that rested are slow at first. A
    user calls one model again and again, so the first calls of a block are not timed.
    """
    timer, order, drawn = CpuTimer(), list(runs), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in runs}
    calls: dict[str, int] = {}
    for name, run in runs.items():
        shortest = min(timer.time(run, 1).seconds for _ in range(3))
        calls[name] = max(1, math.ceil(_SHORTEST_BLOCK / shortest))
    began, rounds = time.perf_counter(), 0
    while rounds < _FEWEST_ROUNDS or time.perf_counter() - began < seconds:
        if rounds % 2:
            order.reverse()
        else:
            drawn.shuffle(order)
        for name in order:
            wait_until_idle()
            led = time.perf_counter()
            while time.perf_counter() - led < LEAD:
                runs[name]()
            times[name].append(timer.time(runs[name], calls[name]).seconds)
        rounds += 1
    return times
