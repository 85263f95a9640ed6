"""The clock and the memory of a CUDA device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from fxopt.bench.clocks import clock_reader
from fxopt.bench.timer import Sample
from fxopt.errors import EngineError

_LONGEST_FILL = 0.5
"""Seconds that the queue is held up at most, so that a slow launch does not hang the device."""
_WARM_UP_CALLS = 3
"""Calls before a graph is captured: libraries set themselves up in the first ones, which a graph may not hold."""


class CudaTimer:
    """Time of the GPU between two events on a queue that is already full, with the wall time beside it.

    The queue is filled behind a kernel that spins while the CPU launches the calls, so the events enclose work of
    the GPU and no waiting for launches. The wall time is taken from an empty queue until the GPU is done: for small
    models it is longer, because launching costs more than computing. Clocks are read while the GPU is at work.

    Args:
        device: the GPU.
        cold_cache: empty its L2 cache before each call, as other work between two calls would; then each call has
            events of its own, and there is no wall time.
    """

    def __init__(self, device: torch.device, *, cold_cache: bool = False):
        self._device = device
        self._cycles_per_second = _spin_rate(device)
        self._flush = _filler(device) if cold_cache else None
        clocks = clock_reader(device)
        self._read_clocks = None if isinstance(clocks, str) else clocks
        self.limits: tuple[str, ...] = (clocks,) if isinstance(clocks, str) else ()

    def time(self, call: Callable[[], object], calls: int) -> Sample:
        """Time so many calls together, once by the wall and once by events."""
        with torch.cuda.device(self._device):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                self._empty_cache()
                call()
            launched = time.perf_counter() - start
            torch.cuda.synchronize()
            wall = time.perf_counter() - start
            # One pair of events around all calls, or, where the cache is emptied between, one around each.
            pairs = [_events() for _ in range(1 if self._flush is None else calls)]
            _spin(int(self._cycles_per_second * min(1.5 * launched, _LONGEST_FILL)))
            for first, last in pairs:
                self._empty_cache()
                first.record()
                for _ in range(calls // len(pairs)):
                    call()
                last.record()
            clocks = None if self._read_clocks is None else self._read_clocks()
            pairs[-1][1].synchronize()
        seconds = sum(first.elapsed_time(last) for first, last in pairs) / 1e3 / calls
        return Sample(seconds, None, wall / calls if self._flush is None else None, clocks)

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.perf_counter()

    def _empty_cache(self) -> None:
        if self._flush is not None:
            self._flush.zero_()


def graph_of(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """A call that replays what `call` launches, as one CUDA graph: no launch costs the CPU anything then.

    Raises:
        EngineError: where it can't be captured, because it waits for the GPU, for one.
    """
    stream = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_CALLS):
                    call()
            torch.cuda.current_stream(device).wait_stream(stream)
            with torch.cuda.graph(graph, stream=stream):
                call()
    except Exception as error:
        first = str(error).partition("\n")[0]
        raise EngineError(f"no CUDA graph can be captured of it: {type(error).__name__}: {first}") from error
    return graph.replay


def cuda_peak_memory(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch's allocator handed out at the peak of one call, beyond what was held before it."""
    torch.cuda.synchronize(device)
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device)) - int(held)


def _filler(device: torch.device) -> torch.Tensor:
    """A tensor that leaves nothing else in the L2 cache once it is written."""
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(2 * size, dtype=torch.int8, device=device)


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _spin(cycles: int) -> None:
    torch.cuda._sleep(cycles)


def _spin_rate(device: torch.device) -> float:
    """Cycles that the spinning kernel runs in a second."""
    cycles = 10_000_000
    with torch.cuda.device(device):
        _spin(cycles)
        torch.cuda.synchronize()
        first, last = _events()
        first.record()
        _spin(cycles)
        last.record()
        last.synchronize()
        return cycles / (float(first.elapsed_time(last)) / 1e3)
