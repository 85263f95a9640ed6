"""The clock and the memory of a CUDA device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fxopt.bench.timer import Sample

_LONGEST_FILL = 0.5
"""Seconds that the queue is held up at most, so that a slow launch does not hang the device."""


class CudaTimer:
    """Time of the GPU between two events on a queue that is already full, with the wall time beside it.

    The queue is filled behind a kernel that spins while the CPU launches the calls, so the events enclose work of
    the GPU and no waiting for launches. The wall time is taken from an empty queue until the GPU is done: for small
    models it is longer, because launching costs more than computing.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._cycles_per_second = _spin_rate(device)

    def time(self, call: Callable[[], object], calls: int) -> Sample:
        """Time so many calls together, once by the wall and once by events."""
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                call()
            launched = time.perf_counter() - start
            torch.cuda.synchronize()
            wall = time.perf_counter() - start
            first, last = _events()
            _spin(int(self._cycles_per_second * min(1.5 * launched, _LONGEST_FILL)))
            first.record()
            for _ in range(calls):
                call()
            last.record()
            last.synchronize()
        return Sample(first.elapsed_time(last) / 1e3 / calls, None, wall / calls)

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.perf_counter()


def cuda_peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch's allocator handed out at the peak of one call, beyond what was held before it."""
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - int(held)


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _spin(cycles: int) -> None:
    torch.cuda._sleep(cycles)


def _spin_rate(device: torch.device, cycles: int = 10_000_000) -> float:
    """Cycles that the spinning kernel runs in a second."""
    with torch.cuda.device(device):
        _spin(cycles)
        torch.cuda.synchronize()
        first, last = _events()
        first.record()
        _spin(cycles)
        last.record()
        last.synchronize()
        return cycles / (float(first.elapsed_time(last)) / 1e3)
