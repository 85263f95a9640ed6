"""Latency that can be believed: timers, paired comparison, sizes and the computer's fingerprint."""

from fxopt.bench.clocks import Clocks
from fxopt.bench.comparison import BeforeAfter, Comparison, Times
from fxopt.bench.device import unavailable
from fxopt.bench.fingerprint import Fingerprint, fingerprint
from fxopt.bench.pairs import Progress, compare
from fxopt.bench.rows import compare_on
from fxopt.bench.size import Size, measure_size
from fxopt.bench.statistics import Verdict
from fxopt.bench.timer import CpuTimer, Sample, Timer

__all__ = [
    "BeforeAfter",
    "Clocks",
    "Comparison",
    "CpuTimer",
    "Fingerprint",
    "Progress",
    "Sample",
    "Size",
    "Timer",
    "Times",
    "Verdict",
    "compare",
    "compare_on",
    "fingerprint",
    "measure_size",
    "unavailable",
]
