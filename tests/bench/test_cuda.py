from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxopt.bench import compare, measure_size
from fxopt.bench.cuda import CudaTimer

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
def test_events_and_wall_time() -> None:
    device = torch.device("cuda", 0)
    x = torch.randn(1024, 1024, device=device)
    sample = CudaTimer(device).time(lambda: x @ x, 10)
    assert sample.wall is not None
    assert sample.seconds > 0
    assert sample.preempted is None


@needs_cuda
def test_comparison_on_the_gpu_leaves_modules_on_the_cpu() -> None:
    module = nn.Linear(64, 64)
    found = compare(module, nn.Linear(64, 64), torch.randn(8, 64), "cuda", pairs=10)
    assert module.weight.device.type == "cpu"
    assert found.device == "cuda"
    assert found.wall_ms is not None
    assert found.peak_memory.before is not None and found.peak_memory.before >= 8 * 64 * 4


@needs_cuda
def test_size_on_the_gpu() -> None:
    assert measure_size(nn.Linear(64, 64), torch.randn(8, 64), "cuda").flops == 2 * 8 * 64 * 64


class FakeGpu:
    """A GPU that notes what it is asked to do, in order; a spin and each call take a millisecond of its time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.milliseconds = 0.0
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                gpu.asked.append("record")
                self.at = gpu.milliseconds

            def synchronize(self) -> None:
                gpu.asked.append("wait for event")

            def elapsed_time(self, other: Any) -> float:
                return float(other.at - self.at)

        class Device:
            def __init__(self, device: torch.device) -> None: ...
            def __enter__(self) -> None: ...
            def __exit__(self, *_: object) -> None: ...

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "device", Device)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self._work("spin"), raising=False)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: self.asked.append("synchronize"))

    def _work(self, what: str) -> None:
        self.asked.append(what)
        self.milliseconds += 1

    def call(self) -> None:
        self._work("call")


def test_events_enclose_the_calls_alone_behind_a_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    timer = CudaTimer(torch.device("cuda", 0))
    gpu.asked.clear()
    sample = timer.time(gpu.call, 2)
    assert gpu.asked == [
        *["synchronize", "call", "call", "synchronize"],
        *["spin", "record", "call", "call", "record", "wait for event"],
    ]
    assert sample.seconds == pytest.approx(1e-3)
    assert sample.wall is not None
