"""Latency that can be believed: timers, paired comparison, sizes and the computer's fingerprint."""

from fxopt.bench.clocks import Clocks
from fxopt.bench.cold import ColdStart, cold_start
from fxopt.bench.comparison import BeforeAfter, Comparison, Times
from fxopt.bench.device import unavailable
from fxopt.bench.fingerprint import Fingerprint, fingerprint
from fxopt.bench.latency import Latency, measure_latency
from fxopt.bench.pairs import Progress, compare, compare_all
from fxopt.bench.profiling import Cost, Profile, profile
from fxopt.bench.roofline import Roofline, measure_roofline
from fxopt.bench.rows import compare_on
from fxopt.bench.size import Size, measure_size
from fxopt.bench.statistics import Verdict
from fxopt.bench.surroundings import set_interop_threads
from fxopt.bench.throughput import Throughput, measure_throughput
from fxopt.bench.timer import CpuTimer, Sample, Timer

__all__ = [
    "BeforeAfter",
    "Clocks",
    "ColdStart",
    "Comparison",
    "Cost",
    "CpuTimer",
    "Fingerprint",
    "Latency",
    "Profile",
    "Progress",
    "Roofline",
    "Sample",
    "Size",
    "Throughput",
    "Timer",
    "Times",
    "Verdict",
    "cold_start",
    "compare",
    "compare_all",
    "compare_on",
    "fingerprint",
    "measure_latency",
    "measure_roofline",
    "measure_size",
    "measure_throughput",
    "profile",
    "set_interop_threads",
    "unavailable",
]
