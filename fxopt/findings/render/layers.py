"""The numbers of the layers as a table."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from fxopt.findings.layer import Layer

_HEAD = ("module", "class", "mean", "variance", "zeros", "lowest", "highest", "gradient", "gain", "wanted")


def layers(measured: Sequence[Layer]) -> str:
    """One row a layer, in the order in which they ran; "" where none ran."""
    several = len({each.target for each in measured}) > 1
    rows = []
    for each in measured:
        name = f"{each.target}: {each.module}" if several else each.module or "the model"
        values = (each.mean, each.variance, each.zeros, each.low, each.high, each.gradient, each.gain, each.wanted_gain)
        rows.append([name, each.kind, *("" if value is None else f"{value:.3g}" for value in values)])
    aligned = ("left", "left", *["right"] * 8)
    return tabulate(rows, _HEAD, "simple", disable_numparse=True, colalign=aligned) + "\n" if rows else ""
