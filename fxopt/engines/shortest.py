"""What each of several ways to compute something takes at best, for choices that are made while building."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from fxopt.engines.contract import Run
from fxopt.inputs import Inputs

_ROUNDS = 15
_FEWEST = 3
"""Rounds, since one may be disturbed; what disturbs a call of seconds is a small part of it, and one does."""


def caller(run: Run, inputs: Inputs) -> Callable[[], object]:
    """What calls `run` on copies of the inputs, into which it may write."""
    given = inputs.map(lambda tensor: tensor.detach().clone())
    return lambda: given.call(run)


def shortest(calls: Mapping[str, Callable[[], object]], budget_seconds: float) -> dict[str, float]:
    """The shortest time of each in seconds, taken in turns; a round is begun while there is budget.

    Three are, however long they take, but where they would take more than three times the budget.
    """
    # One thread is measured by its own time, in which no other process has a part.
    clock = time.thread_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter
    best = dict.fromkeys(calls, float("inf"))
    for call in calls.values():
        call()
    _wait()
    began = time.perf_counter()
    for number in range(_ROUNDS):
        spent = time.perf_counter() - began
        if spent > (budget_seconds if number >= _FEWEST else _FEWEST * budget_seconds):
            break
        for name, call in calls.items():
            start = clock()
            call()
            _wait()
            best[name] = min(best[name], clock() - start)
    return best


def _wait() -> None:
    """For what a GPU has still to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
