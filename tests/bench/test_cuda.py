from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.bench import Clocks, Comparison, Sample, Verdict, compare, compare_on, cuda, measure_size
from fxopt.bench.clocks import clock_reader
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


@needs_cuda
@pytest.mark.parametrize("row", ["cuda", "cuda, cold L2", "cuda, graph replay"])
def test_a_gpu_is_measured_warm_cold_and_replayed(row: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU()).eval()
    found = compare_on("cuda", model, copy.deepcopy(model), torch.randn(8, 64), budget_seconds=3)
    assert list(found) == ["cuda", "cuda, cold L2", "cuda, graph replay"]
    measured = found[row]
    assert isinstance(measured, Comparison)
    assert (measured.wall_ms is None) == (row == "cuda, cold L2")


@needs_cuda
def test_what_waits_for_the_gpu_has_no_graph() -> None:
    class Waits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * x.sum().item()

    found = compare_on("cuda", Waits(), Waits(), torch.randn(8), budget_seconds=3)
    assert "no CUDA graph can be captured of it" in str(found["cuda, graph replay"])
    assert isinstance(found["cuda"], Comparison)


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
        monkeypatch.setattr(cuda, "clock_reader", lambda device: self._read_clocks)
        monkeypatch.setattr(cuda, "_filler", lambda device: self)

    def zero_(self) -> None:
        self._work("flush")

    def _read_clocks(self) -> Clocks:
        self.asked.append("clocks")
        return Clocks(1500.0)

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
        *["spin", "record", "call", "call", "record", "clocks", "wait for event"],
    ]
    assert sample.seconds == pytest.approx(1e-3)
    assert sample.wall is not None
    assert sample.clocks == Clocks(1500.0)


def test_a_cold_cache_is_emptied_outside_of_the_events(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    timer = CudaTimer(torch.device("cuda", 0), cold_cache=True)
    gpu.asked.clear()
    sample = timer.time(gpu.call, 2)
    once = ["flush", "record", "call", "record"]
    assert gpu.asked == [
        *["synchronize", "flush", "call", "flush", "call", "synchronize"],
        *["spin", *once, *once, "clocks", "wait for event"],
    ]
    assert sample.seconds == pytest.approx(1e-3)
    assert sample.wall is None


class Ticks:
    """A timer of equal times, at the clocks of the arm whose turn it is."""

    limits = ()

    def __init__(self, clocks: dict[str, Clocks]):
        self.clocks = clocks
        self.at = 0.0

    def time(self, call: Callable[[], object], calls: int) -> Sample:
        name = str(call())
        self.at += 1e-3
        return Sample(1e-3, None, 2e-3, self.clocks[name])

    def now(self) -> float:
        return self.at


def test_clocks_of_the_arms_that_differ_leave_no_verdict() -> None:
    clocks = {"slow": Clocks(1400.0, ("power cap",)), "fast": Clocks(1980.0)}
    timer = Ticks(clocks)
    found = compare(lambda x: "fast", lambda x: "slow", torch.zeros(1), pairs=40, timer=timer)
    assert found.clocks is not None
    assert (found.clocks.before.sm_mhz, found.clocks.after.sm_mhz) == (1980.0, 1400.0)
    assert found.verdict is Verdict.INCONCLUSIVE
    assert "the GPU was held back while 'after' ran: power cap" in found.notes
    assert any(note.startswith("the GPU ran at 1980 MHz before and 1400 MHz after") for note in found.notes)


def test_equal_clocks_are_compared() -> None:
    timer = Ticks({"slow": Clocks(1975.0), "fast": Clocks(1980.0)})
    found = compare(lambda x: "fast", lambda x: "slow", torch.zeros(1), pairs=40, timer=timer)
    assert found.verdict is Verdict.EQUIVALENT
    assert found.notes == () or all("MHz" not in note for note in found.notes)


def test_what_only_a_gpu_has_is_refused_elsewhere() -> None:
    with pytest.raises(ValueError, match="cold_cache and graph are for a GPU, and the device is 'cpu'"):
        compare(nn.Identity(), nn.Identity(), torch.zeros(1), cold_cache=True)


def test_without_nvml_the_reason_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert clock_reader(torch.device("cuda", 0)) == (
        "clocks are not known: `pip install 'fxopt[cuda]'` brings what reads them"
    )


def test_clocks_come_from_nvml_with_the_reasons_that_held_them_down(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(uuid="4f")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    nvml = SimpleNamespace(
        NVML_CLOCK_SM=1,
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: {"GPU-4f": "it"}[uuid],
        nvmlDeviceGetClockInfo=lambda handle, kind: {("it", 1): 1755}[handle, kind],
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x1 | 0x4 | 0x40,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    read = clock_reader(torch.device("cuda", 0))
    assert not isinstance(read, str)
    assert read() == Clocks(1755.0, ("power cap", "hardware thermal slowdown"))
