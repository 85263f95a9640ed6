from __future__ import annotations

import functools
import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fxopt import compare
from fxopt.bench import idle, pairs
from fxopt.bench.idle import wait_until_idle

pytestmark = pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="this system does not tell of threads")


class Work(threading.Thread):
    """Computes for about a tenth of a second, without Python's lock.

    It needs the lock once more to say when it ended, and seems to sleep while it waits for that: hence `_LATE`.
    """

    def __init__(self, rounds: int = 200_000) -> None:
        super().__init__()
        self.rounds = rounds
        self.began = self.ended = time.perf_counter()
        self.start()

    def run(self) -> None:
        hashlib.pbkdf2_hmac("sha256", b"a", b"b", self.rounds)
        self.ended = time.perf_counter()


_LATE = 0.02


@pytest.fixture
def sleeper() -> Iterator[None]:
    """A thread that waits for something."""
    end = threading.Event()
    thread = threading.Thread(target=end.wait)
    thread.start()
    yield
    end.set()
    thread.join()


def test_it_waits_for_threads_that_compute_but_not_for_those_that_sleep(sleeper: None) -> None:
    work = Work()
    rests, now = wait_until_idle(longest=30), time.perf_counter()
    work.join()
    assert rests and now > work.ended - _LATE


def test_it_gives_up_on_a_thread_that_goes_on() -> None:
    work = Work(2_000_000)
    assert not wait_until_idle(longest=0.05)
    work.join()


@pytest.mark.parametrize(("state", "rests"), [("S", True), ("R", False)])
def test_a_thread_may_have_any_name(state: str, rests: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "stat").write_bytes(b"0 (a) R (\xd0) %s 1" % state.encode())
    monkeypatch.setattr(idle, "_TASKS", tmp_path)
    assert wait_until_idle(longest=0.05) is rests


def test_where_the_system_does_not_tell_it_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "_TASKS", Path("/nowhere"))
    work = Work(2_000_000)
    assert wait_until_idle() and work.is_alive()
    work.join()


def test_no_side_of_a_comparison_runs_beside_threads_that_another_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    # Other work on the machine may keep these threads from their end for longer than a comparison waits.
    monkeypatch.setattr(pairs, "wait_until_idle", functools.partial(wait_until_idle, longest=30))
    left: list[Work] = []
    begun: list[float] = []

    def leaves(x: torch.Tensor) -> torch.Tensor:
        left.append(Work(50_000))
        return x

    def watches(x: torch.Tensor) -> torch.Tensor:
        begun.append(time.perf_counter())
        time.sleep(0.005)
        return x

    found = compare(leaves, watches, torch.ones(1), pairs=8, budget_seconds=0.1)
    for work in left:
        work.join()
    timed = begun[-8 * found.calls :]
    beside = [any(work.began < moment < work.ended - _LATE for work in left) for moment in timed]
    # On a busy machine one that has its result may wait longer to say so; without waiting it is nearly all of them.
    assert sum(beside) <= len(beside) / 4


WATCHED = """
import sys
import torch
from fxopt.bench.memory import peak_memory

def layers(x):
    x = torch.nn.functional.conv2d(x, x)
    if x.sum() > 0:
        x = x + 1
    return x * 2

x, cpu = torch.ones(1, 1, 4, 4), torch.device("cpu")
eager = peak_memory(lambda: layers(x), cpu)
print([name for name in ("torch._dynamo", "torch._inductor") if name in sys.modules])
compiled = torch.compile(layers, backend="eager")
compiled(x)
frames = dict(torch._dynamo.utils.counters["frames"])
print(peak_memory(lambda: compiled(x), cpu) == eager, frames == dict(torch._dynamo.utils.counters["frames"]))
"""


def test_watching_operators_imports_no_compiler_and_is_not_compiled_itself() -> None:
    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "True True"]
