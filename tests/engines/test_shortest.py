"""Ways to compute something, timed while building."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fxopt.engines import shortest as timing


@pytest.mark.parametrize(
    ("seconds", "budget", "rounds"),
    [(0.01, 1.0, 15), (0.2, 1.0, 3), (0.6, 1.0, 3), (2.0, 1.0, 1), (9.0, 1.0, 1)],
    ids=["short calls", "three rounds are the budget", "three rounds are more", "a round is far more", "long calls"],
)
def test_long_calls_are_timed_in_fewer_rounds(
    seconds: float, budget: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, called = 0.0, []

    def call(name: str, factor: float) -> None:
        nonlocal now
        now += factor * seconds
        called.append(name)

    def clock() -> float:
        return now

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock, thread_time=clock))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    times = timing.shortest({"one": lambda: call("one", 1), "other": lambda: call("other", 0.7)}, budget)
    assert times == pytest.approx({"one": seconds, "other": 0.7 * seconds})
    assert called == ["one", "other"] * (1 + rounds)
