"""What this machine can do at best: arithmetic and memory traffic a second, as measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fxopt.bench.cuda import CudaTimer
from fxopt.bench.surroundings import quiet
from fxopt.bench.timer import CpuTimer, Timer

_SIDE = {"cpu": 1024, "cuda": 4096}
_BYTES = {"cpu": 2**26, "cuda": 2**29}
"""Larger than any cache, so that the memory is measured and not the cache."""
_REPEATS = 7


@dataclass(frozen=True)
class Roofline:
    """The two ceilings of a machine.

    Attributes:
        flops_per_second: of a large matrix product.
        bytes_per_second: read and written by a copy that no cache holds.
        dtype: that the product was measured in.
    """

    flops_per_second: float
    bytes_per_second: float
    dtype: str

    def shortest(self, flops: float, traffic: float) -> float:
        """Seconds that so many operations and bytes take at least. (Williams, Waterman and Patterson 2009)"""
        return max(flops / self.flops_per_second, traffic / self.bytes_per_second)


def measure_roofline(device: torch.device, dtype: torch.dtype = torch.float32, threads: int | None = None) -> Roofline:
    """Measure both ceilings; the best of a few tries, since noise only ever slows down."""
    side, size = _SIDE[device.type], _BYTES[device.type]
    with quiet(device, threads):
        timer: Timer = CudaTimer(device) if device.type == "cuda" else CpuTimer()
        one = torch.ones(side, side, dtype=dtype, device=device)
        product = torch.empty_like(one)
        source = torch.ones(size // 8, dtype=torch.float64, device=device)
        target = torch.empty_like(source)
        product_seconds, copy_seconds = [], []
        for _ in range(_REPEATS):
            product_seconds.append(timer.time(lambda: torch.mm(one, one, out=product), 1).seconds)
            copy_seconds.append(timer.time(lambda: target.copy_(source), 1).seconds)
    return Roofline(
        flops_per_second=2 * side**3 / min(product_seconds),
        bytes_per_second=2 * size / min(copy_seconds),
        dtype=str(dtype).removeprefix("torch."),
    )
