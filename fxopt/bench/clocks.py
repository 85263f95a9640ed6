"""What a GPU ran at while it was timed, and what held it back."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# The bits of NVML's clock event reasons that slow a GPU down; those of an idle one or of clocks that
# somebody set are no throttling.
_THROTTLED = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x10: "sync boost",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "power brake",
}


@dataclass(frozen=True)
class Clocks:
    """The clocks of a GPU.

    Attributes:
        sm_mhz: of its multiprocessors, in MHz; the median where it stands for many readings.
        throttled: what held them down, in NVML's words.
    """

    sm_mhz: float
    throttled: tuple[str, ...] = ()


ReadClocks = Callable[[], Clocks]
_SAME = 0.01
"""Share by which the clocks of two sides may differ and their times still be compared."""


def clock_reader(device: torch.device) -> ReadClocks | str:
    """A function that reads the clocks of a GPU at this moment, or why they can't be read."""
    try:
        import pynvml
    except ImportError:
        return "clocks are not known: `pip install 'fxopt[cuda]'` brings what reads them"
    try:
        pynvml.nvmlInit()
        handle = _handle(pynvml, device)
        _read(pynvml, handle)
    except pynvml.NVMLError as error:
        return f"clocks are not known: the driver's NVML says {str(error)!r}"
    return lambda: _read(pynvml, handle)


def median_clocks(readings: Sequence[Clocks]) -> Clocks:
    """What one arm ran at: the median clock, and whatever held it back at any time."""
    reasons = dict.fromkeys(reason for reading in readings for reason in reading.throttled)
    return Clocks(statistics.median(reading.sm_mhz for reading in readings), tuple(reasons))


def clocks_differ(one_mhz: float, other_mhz: float) -> bool:
    """Whether times taken at the one clock say nothing beside those taken at the other."""
    return abs(math.log(one_mhz / other_mhz)) > math.log1p(_SAME)


def _handle(pynvml: Any, device: torch.device) -> Any:
    # By its UUID: CUDA_VISIBLE_DEVICES renumbers what torch sees, not what NVML does.
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return pynvml.nvmlDeviceGetHandleByUUID(uuid)


def _read(pynvml: Any, handle: Any) -> Clocks:
    bits = pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)
    throttled = tuple(reason for bit, reason in _THROTTLED.items() if bits & bit)
    return Clocks(float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)), throttled)
