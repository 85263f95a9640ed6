"""What surrounds the calls that a window times."""

from __future__ import annotations

import functools
import os
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fxopt.bench.timer import timed_together
from fxopt.errors import GateError
from fxopt.gate.processes import Checkout, Launcher, Worker
from fxopt.gate.window import shared_core, take_window

PLACED = """
import os, torch
from torch import nn

class Net(nn.Module):
    def forward(self, x):
        if len(os.sched_getaffinity(0)) != EXPECTED:
            raise RuntimeError(f"on {os.sched_getaffinity(0)}")
        return x

model, example_inputs = Net(), torch.zeros(1)
"""
PLAIN = """
import torch

model, example_inputs = torch.nn.Identity(), torch.zeros(1)
"""
LEAVES_WORK = """
import hashlib, pathlib, threading, time, torch
from torch import nn

def work():
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 50_000)
    pathlib.Path("ended").write_text(str(time.monotonic()))

class Net(nn.Module):
    def forward(self, x):
        threading.Thread(target=work).start()
        return x

model, example_inputs = Net(), torch.zeros(1)
"""
FILLS = """
import torch
from torch import nn

class Cache:
    def __init__(self):
        self.kept = []

class Net(nn.Module):
    def forward(self, x, cache):
        if len(cache.kept) == 4:
            raise IndexError("the cache is full")
        cache.kept.append(x)
        return x

model, example_inputs = Net(), (torch.zeros(1), Cache())
"""


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    with Launcher() as found:
        yield found


def started(launcher: Launcher, directory: Path, text: str, threads: int) -> Worker:
    (directory / "model.py").write_text(text)
    order = {"target": "model.py", "inputs": [], "weights": None, "passes": "", "engine": ""}
    order |= {"device": "cpu", "threads": threads}
    (worker,) = launcher.start((Checkout("head", "head", directory), order))
    worker.prepare("build")
    return worker


needs_cores = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no call for cores")


@needs_cores
@pytest.mark.parametrize("threads", [1, 2])
def test_sides_of_one_thread_share_a_core(threads: int, launcher: Launcher, tmp_path: Path) -> None:
    cores = 1 if threads == 1 else len(os.sched_getaffinity(0))
    with started(launcher, tmp_path, PLACED.replace("EXPECTED", str(cores)), threads) as worker:
        starts = dict.fromkeys(("base", "head"), functools.partial(launcher.twin, worker))
        assert take_window(starts, budget=0.1, tight=0.05).times("head")


@needs_cores
def test_the_core_is_drawn_anew_among_those_that_are_allowed() -> None:
    def cores(**order: object) -> set[int | None]:
        workers = [SimpleNamespace(order={"threads": 1, "device": "cpu", **order})]
        draw = random.Random(0)
        return {core[0] if (core := shared_core(workers, draw)) else None for _ in range(50)}  # type: ignore[arg-type]

    assert cores() == os.sched_getaffinity(0)
    assert cores(threads=2) == cores(device="cuda") == {None}


def test_without_a_call_for_cores_they_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    worker = SimpleNamespace(order={"threads": 1, "device": "cpu"})
    assert shared_core([worker], random.Random(0)) is None  # type: ignore[list-item]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not tell of threads")
def test_a_side_answers_once_no_thread_of_it_computes(launcher: Launcher, tmp_path: Path) -> None:
    with started(launcher, tmp_path, LEAVES_WORK, 1) as worker:
        worker.ask("warm")
        ended = tmp_path / "ended"
        ended.unlink(missing_ok=True)
        worker.ask("time", calls=1)
        now = time.monotonic()
        while not ended.exists() or not ended.read_text():
            time.sleep(0.01)
    # The thread waits for Python's lock before it writes, and seems to sleep then.
    assert now > float(ended.read_text()) - 0.02


def test_processes_meet_though_the_place_for_files_has_a_long_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / ("long" * 30)
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    own = set(Path("/tmp").glob(f"fxopt-gate-{os.getpid()}-*"))
    with Launcher() as launcher, started(launcher, tmp_path, PLAIN, 1) as worker:
        launcher.twin(worker).close()
    assert not list(place.iterdir())
    assert set(Path("/tmp").glob(f"fxopt-gate-{os.getpid()}-*")) == own


class Takes:
    """Stands in for a process whose calls take so many seconds, and counts what they took."""

    def __init__(self, seconds: float) -> None:
        self.each, self.taken = seconds, 0.0
        self.order = {"threads": 2, "device": "cpu"}

    def begin(self, do: str, **facts: object) -> None:
        """Warm up."""

    def answer(self) -> bool:
        return False

    def ask(self, do: str, calls: int) -> dict[str, object]:
        self.taken += calls * self.each
        return {"seconds": self.each, "preempted": None, "mhz": None}

    def close(self) -> None:
        """Be done."""


def test_a_long_call_of_the_head_is_not_repeated_as_often_as_a_short_one_of_the_base() -> None:
    sides = {"base": Takes(1e-5), "head": Takes(0.5)}
    starts: Any = {name: functools.partial(sides.get, name) for name in sides}
    found = take_window(starts, budget=2, tight=0.05)
    assert found.effect.ratio == pytest.approx(5e4)
    assert found.measuring / len(found.times("head")) < 0.6


def test_a_model_that_is_too_slow_for_the_budget_says_which_side_takes_how_long() -> None:
    sides = {"base": Takes(0.2), "head": Takes(3.0)}
    starts: Any = {name: functools.partial(sides.get, name) for name in sides}
    with pytest.raises(GateError, match="200 ms in the base and 3000 ms in the head"):
        take_window(starts, budget=1, tight=0.05)


def test_a_call_that_the_clock_sees_take_no_time_is_timed_some_thousand_times() -> None:
    calls = timed_together({"base": 0.0, "head": 1.0})
    assert calls["head"] == 1 and 1000 < calls["base"] < 10_000


def test_calls_that_write_into_their_inputs_are_timed_one_by_one(launcher: Launcher, tmp_path: Path) -> None:
    with started(launcher, tmp_path, FILLS, 1) as worker:
        starts = dict.fromkeys(("base", "head"), functools.partial(launcher.twin, worker))
        assert take_window(starts, budget=0.1, tight=0.05).calls == 1
