"""Plots as SVG text: told apart by shape and label as well as by colour."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fxopt.report import words

# Matplotlib is optional, and slow to import: it is imported where it draws.


def distributions(times: Mapping[str, Sequence[float]]) -> str:
    """How often the base and the head took how long: two step lines, medians marked."""
    import numpy as np

    figure, axes = _figure(3.0)
    both = np.concatenate([np.asarray(times["base"]), np.asarray(times["head"])]) * 1e3
    # A stalled call would squeeze all the others into one bin.
    bins = min(40, round(2 * len(both) ** 0.5))
    edges = np.linspace(both.min(), np.quantile(both, 0.98), bins + 1)
    medians = {side: float(np.median(times[side])) * 1e3 for side in ("base", "head")}
    for side, style, colour in (("base", "-", "#1b5e8c"), ("head", "--", "#b3450f")):
        counts, _ = np.histogram(np.clip(np.asarray(times[side]) * 1e3, edges[0], edges[-1]), edges)
        axes.stairs(counts, edges, linestyle=style, color=colour, linewidth=1.6)
        median = medians[side]
        axes.axvline(median, linestyle=style, color=colour, linewidth=1)
        # The label of the smaller one stands before it, that of the other behind.
        first = (median, side) == min((other, name) for name, other in medians.items())
        axes.annotate(
            f"{side} {words.duration(median)}",
            (median, 1.0),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            xytext=(-4 if first else 4, -10),
            horizontalalignment="right" if first else "left",
            color=colour,
            fontsize=9,
        )
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.15)  # for the labels
    axes.set_xlabel("milliseconds a call (the slowest 2 % are in the last bin)")
    axes.set_ylabel("samples")
    return _svg(figure, "How long calls of the base and of the head took")


def ladder(rungs: Sequence[Mapping[str, Any]]) -> str:
    """The ratio head over base after each pass, as bars from 0 % on."""
    figure, axes = _figure(0.7 + 0.4 * len(rungs))
    names = [rung["after"] for rung in rungs][::-1]
    changes = [100 * (rung["ratio"] - 1) for rung in rungs][::-1]
    # By position: a pass that runs twice has two bars.
    bars = axes.barh(range(len(names)), changes, tick_label=names, color="#d8c7b8", edgecolor="#5b4636")
    axes.bar_label(bars, [f" {change:+.1f} %" for change in changes])
    axes.axvline(0, color="black", linewidth=0.8)
    axes.margins(x=0.2)
    axes.set_xlabel("head slower than base, in %")
    return _svg(figure, "How much slower the head is after each pass")


def over_time(entries: Sequence[Mapping[str, Any]]) -> str:
    """Medians with their intervals, and the band that is noise."""
    from fxopt.gate.baseline import noise_band

    figure, axes = _figure(2.6)
    positions = list(range(len(entries)))
    medians = [one["median_ms"] for one in entries]
    spans = [
        [one["median_ms"] - one["low_ms"] for one in entries],
        [one["high_ms"] - one["median_ms"] for one in entries],
    ]
    axes.errorbar(positions, medians, spans, fmt="o-", color="#1b5e8c", capsize=3, linewidth=1)
    band = noise_band(entries)
    if band is not None:
        axes.axhspan(*band, facecolor="none", edgecolor="#777777", hatch="///", linewidth=0, alpha=0.5, label="noise")
        axes.legend(frameon=False)
    axes.set_xticks(positions, [one["commit"][:7] for one in entries], rotation=45, ha="right")
    axes.set_ylabel("ms a call")
    axes.set_ylim(bottom=0)
    return _svg(figure, "The latency over time")


def _figure(height: float) -> tuple[Any, Any]:
    # Not pyplot: it would choose a window system and keep every figure.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, height), layout="constrained")
    axes = figure.subplots()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _svg(figure: Any, title: str) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "fxopt", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    found = text.getvalue()
    found = found[found.index("<svg") :]
    found = re.sub(r"<metadata>.*?</metadata>", "", found, flags=re.S)
    found = re.sub(r'(<svg\b[^>]*?) width="[^"]*"', r"\1", found, count=1)
    found = re.sub(r'(<svg\b[^>]*?) height="[^"]*"', r"\1", found, count=1)
    return re.sub(r"<svg\b", f'<svg role="img" aria-label="{title}"', found, count=1)
