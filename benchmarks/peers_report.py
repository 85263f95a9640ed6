"""What the rows of peers.py say: tables in Markdown, and a plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fxopt.bench.statistics import paired_interval

OURS = ("onednn", "auto", "auto 1e-2")
ROUNDED = ("openvino bf16", "auto 1e-2")
"""Arms that compute in fewer bits: float32 is not held against them."""
TWICE = ("onnxruntime", "openvino", "openvino bf16")
"""Peers that are built a second time, for what two builds of the same model differ by."""
Row = Mapping[str, Any]
Effect = tuple[float, float, float]
"""How many times as fast, and the ends of the 95 % interval."""


def again(peer: str) -> str:
    """The arm that is another build of a peer."""
    return f"{peer}, again"


def render(rows: Sequence[Row]) -> str:
    """Speed-ups over eager, each of ours beside each peer, builds, memory and errors."""
    if not rows:
        return "no rows yet\n"
    done = [row for row in rows if not row.get("failed")]
    machine: Mapping[str, Any] = next((row["machine"] for row in done if "machine" in row), {})
    arms = _arms(rows)
    parts = [
        "# fxopt's engines beside their peers",
        f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('threads')} threads, "
        f"{' '.join(machine.get('cpu_flags', ()))}; torch {machine.get('torch')}, oneDNN {machine.get('onednn')}; "
        "`python benchmarks/peers.py`. Medians of paired ratios with their 95 % intervals, all arms of a row in one "
        "process and in turns. `-` is an arm that cannot take the model; peers.json says why, and has all times.",
        "![Speed-ups over eager](peers.svg)",
        "## Speed-up over eager",
        _table(["", *arms], [*_speedups(done, arms), *_means(done, arms, lambda row, arm: _over(row, "eager", arm))]),
    ]
    for ours in (arm for arm in OURS if arm in arms):
        peers = [arm for arm in arms if arm not in OURS and (ours in ROUNDED or arm not in ROUNDED)]
        body = [[_name(row), *(_effect(_over(row, peer, ours)) for peer in peers)] for row in done]
        means = _means(done, peers, lambda row, peer, ours=ours: _over(row, peer, ours))  # type: ignore[misc]
        parts += [f"## `{ours}` beside each: how many times as fast", _table(["", *peers], [*body, *means])]
    parts += [
        "## Another build of the same",
        "How many times as fast a second build of each is, by the same script in the same process. It is chance alone: "
        "no arm is ahead or behind by less.",
        _table(["", *TWICE], _second_builds(done)),
        "## Seconds to build, and relative error",
        "From the module to the first outputs; in parentheses what the chosen engine took of it, without capture and "
        "passes.",
        _table(["", *arms], [[_name(row), *(_build(row["arms"].get(arm, {})) for arm in arms)] for row in done]),
        "## Memory",
        "MiB by which the process grew at the peak of a build and its first call, and in parentheses as a multiple of "
        "the weights; of eager, at the peak of a call.",
        _table(["", "weights", *arms], [_memory(row, arms) for row in done]),
        *(f"- {row['model']} at {row['batch']}: {row['failed']}" for row in rows if row.get("failed")),
    ]
    return "\n\n".join(parts) + "\n"


def plot(rows: Sequence[Row], out: Path) -> None:
    """Draw the speed-ups over eager of all arms, a line of points for each row; the axis is logarithmic."""
    import matplotlib

    matplotlib.use("svg")
    # The same figures give the same file.
    matplotlib.rcParams["svg.hashsalt"] = "peers"
    from matplotlib import pyplot

    done = [row for row in rows if not row.get("failed")][::-1]
    arms = [arm for arm in _arms(done) if arm != "eager"]
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.32 * len(done)), layout="constrained")
    markers = dict(zip(arms, "ox+svD^v<>*P", strict=False))
    for arm in arms:
        found = [(effect, place) for place, row in enumerate(done) if (effect := _over(row, "eager", arm))]
        if not found:
            continue
        ratios = [ratio for (ratio, _, _), _ in found]
        spread = [[ratio - low for (ratio, low, _), _ in found], [high - ratio for (ratio, _, high), _ in found]]
        style: dict[str, Any] = {"color": f"C{OURS.index(arm)}"} if arm in OURS else {"color": "gray", "alpha": 0.6}
        places = [place for _, place in found]
        axes.errorbar(ratios, places, xerr=spread, fmt=markers.get(arm, "."), label=arm, markersize=5, **style)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xscale("log")
    ticks = [0.5, 1, 2, 4, 8, 16]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_yticks(range(len(done)), [_name(row) for row in done])
    axes.set(xlabel="times as fast as eager", title="Latency on the CPU")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


def _arms(rows: Sequence[Row]) -> list[str]:
    """All but the second builds."""
    second = {again(peer) for peer in TWICE}
    return [arm for arm in dict.fromkeys(arm for row in rows for arm in row["arms"]) if arm not in second]


def _table(headings: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return tabulate(body, headings, tablefmt="github", disable_numparse=True)


def _name(row: Row) -> str:
    return f"{row['model']} at {row['batch']}"


def _over(row: Row, before: str, after: str) -> Effect | None:
    """How many times as fast one arm of a row is as another."""
    slow, fast = row["arms"].get(before, {}), row["arms"].get(after, {})
    if "times" not in slow or "times" not in fast:
        return None
    found = paired_interval(slow["times"], fast["times"])
    return 1 / found.ratio, 1 / found.high, 1 / found.low


def _effect(effect: Effect | None) -> str:
    return "-" if effect is None else "{:.2f} [{:.2f}, {:.2f}]".format(*effect)


def _speedups(rows: Sequence[Row], arms: Sequence[str]) -> list[list[str]]:
    def cell(row: Row, arm: str) -> str:
        found = row["arms"].get(arm, {})
        if arm == "eager":
            return f"{found['ms']:.1f} ms" if "ms" in found else "-"
        return _effect(_over(row, "eager", arm)) + (f" ({found['chosen']})" if found.get("chosen") else "")

    return [[_name(row), *(cell(row, arm) for arm in arms)] for row in rows]


def _second_builds(rows: Sequence[Row]) -> list[list[str]]:
    effects = [[_over(row, peer, again(peer)) for peer in TWICE] for row in rows]
    sizes = [[abs(math.log(effect[0])) for effect in column if effect] for column in zip(*effects, strict=True)]
    typical = [f"{math.exp(sum(size) / len(size)):.2f} of {len(size)}" if size else "-" for size in sizes]
    body = [[_name(row), *map(_effect, each)] for row, each in zip(rows, effects, strict=True)]
    return [*body, ["**geometric mean, whichever is faster**", *typical]]


def _means(rows: Sequence[Row], arms: Sequence[str], over: Callable[[Row, str], Effect | None]) -> list[list[str]]:
    """Geometric means, of the rows that each arm could take."""
    lines = []
    for title, kind in (("convolutions", "convolutions"), ("transformers", "transformers"), ("all", None)):
        some = [row for row in rows if kind in (None, row["kind"])]
        if some:
            cells = [_mean([over(row, arm) for row in some]) for arm in arms]
            lines.append([f"**geometric mean, {title}**", *cells])
    return lines


def _mean(effects: Sequence[Effect | None]) -> str:
    found = [effect for effect in effects if effect is not None]
    if not found:
        return "-"
    centre = sum(math.log(ratio) for ratio, _, _ in found) / len(found)
    # Rows are independent: the squares of their half widths add.
    reach = math.sqrt(sum((math.log(high / low) / 2) ** 2 for _, low, high in found)) / len(found)
    text = _effect((math.exp(centre), math.exp(centre - reach), math.exp(centre + reach)))
    return text if len(found) == len(effects) else f"{text} of {len(found)}"


def _build(arm: Mapping[str, Any]) -> str:
    if "build_seconds" not in arm:
        return "-"
    engine = f" ({arm['engine_seconds']:.1f} s)" if "engine_seconds" in arm else ""
    return f"{arm['build_seconds']:.1f} s{engine}, {arm['relative_error']:.0e}"


def _memory(row: Row, arms: Sequence[str]) -> list[str]:
    weights = row["weights_bytes"]
    peaks = [row["arms"].get(arm, {}).get("peak_bytes") for arm in arms]
    cells = ["-" if peak is None else f"{peak / 2**20:.0f} ({peak / weights:.1f}x)" for peak in peaks]
    return [_name(row), f"{weights / 2**20:.0f}", *cells]
