"""Numbers as a reader likes them: three digits and a unit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxopt.bench.statistics import FEWEST_PAIRS
from fxopt.record.shape import LatencyRecord, Number


def machine(found: Mapping[str, Any]) -> str:
    """A fingerprint in one line: CPU, then software."""
    cpu = f"{found['cpu']}, {number_of(found['cores'], 'core')}, {found['cpu_capability']}"
    threads = number_of(found["threads"], "thread")
    if "interop_threads" in found:
        threads += f", {number_of(found['interop_threads'], 'operator')} at once"
    return f"{cpu}; torch {found.get('torch', '?')}, {threads}, {found.get('os', '?')}"


def duration(milliseconds: float) -> str:
    """A time: `4.21 ms`, `87.0 us`, `1.30 s`."""
    if milliseconds >= 1e3:
        return f"{_digits(milliseconds / 1e3)} s"
    if milliseconds >= 1 or milliseconds == 0:
        return f"{_digits(milliseconds)} ms"
    return f"{_digits(1e3 * milliseconds)} us"


def count(number: float | None) -> str:
    """A number of things: `9,408`, `11.7 M`."""
    if number is None:
        return "-"
    if number < 100_000:
        return f"{number:,.0f}"
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{_digits(number / size)} {unit}"
    return f"{_digits(number / 1e3)} k"


def number_of(number: int, thing: str) -> str:
    """So many of something: `1 change`, `12 changes`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def size(number: float | None) -> str:
    """Bytes: `512 B`, `44.6 MiB`."""
    if number is None:
        return "-"
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= factor:
            return f"{_digits(number / factor)} {unit}"
    return f"{number:.0f} B"


def share(part: float) -> str:
    """A share of 1 as a percentage; only exactly 1 reads as 100 %."""
    percent = 100 * part
    if percent in (0, 100):
        return f"{percent:.0f} %"
    return f"{min(max(percent, 0.1), 99.9):.1f} %"


def effect(part: Number) -> str:
    """A small share that may be zero or not finite: `0.8 %`."""
    return part if isinstance(part, str) else f"{100 * part:.1f} %"


def error(value: Number | None) -> str:
    """A relative error: `1.2e-07`."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    return f"{value:.1e}" if value else "0"


def decibels(value: Number) -> str:
    """How far a signal is above the noise: `42.0 dB`; infinitely far is no loss at all."""
    if isinstance(value, str):
        return "no loss" if value == "inf" else f"{value} dB"
    return f"{value:.1f} dB"


def metric(value: Number | None) -> str:
    """What `evaluate` gave, to four digits."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.4g}"


def relative(before: float | None, after: float | None) -> str:
    """How a size changed: `-0.3 %`, `same`."""
    if before is None or after is None:
        return ""
    if before == after:
        return "same"
    return f"{100 * (after / before - 1):+.1f} %" if before else ""


def difference(before: Number | None, after: Number | None) -> str:
    """How a metric changed: `+0.0012`, `same`."""
    if before is None or after is None or isinstance(before, str) or isinstance(after, str):
        return ""
    return "same" if before == after else f"{after - before:+.2g}"


def speedup(latency: LatencyRecord) -> str:
    """The effect with its interval: `1.31x faster [1.28, 1.34]`, `1.05x slower [1.02, 1.08]`, `1.00x [0.99, 1.01]`."""
    ratio, low, high = latency["ratio"], latency["low"], latency["high"]
    if latency["pairs"] < FEWEST_PAIRS:
        return f"{1 / ratio:.2f}x [too few pairs]"
    if latency["verdict"] == "slower":
        return f"{ratio:.2f}x slower [{low:.2f}, {high:.2f}]"
    word = "x faster" if latency["verdict"] == "faster" else "x"
    return f"{1 / ratio:.2f}{word} [{1 / high:.2f}, {1 / low:.2f}]"


def _digits(number: float) -> str:
    """Three significant digits, without an exponent."""
    if number >= 99.95:
        return f"{number:.0f}"
    return f"{number:.1f}" if number >= 9.995 else f"{number:.2f}"


def change(ratio: float) -> str:
    """A ratio of times as a change: `+12.3 %`, `-4.0 %`."""
    return f"{100 * (ratio - 1):+.1f} %"
