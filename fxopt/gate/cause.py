"""Which pass makes the head slower than the base, and which of its changes; or which submodule, where no pass does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fxopt.gate.processes import Worker
from fxopt.gate.window import take_window

_MOST_NAMED = 5

Starts = Callable[[str, "int | None", "int | None"], Callable[[], Worker]]
"""From a side, how many passes and how many changes of the last: what starts a process of it."""


def find_cause(
    starts: Starts,
    ratio: float,
    base: Sequence[Mapping[str, Any]],
    head: Sequence[Mapping[str, Any]],
    files: Sequence[str],
    budget: float,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Find what a regression comes from.

    The ladder: both sides are timed before any pass, then after the first, and so on. The first rung that holds more
    than half of the regression (as a logarithm) is where it comes from.

    Args:
        starts: makes processes.
        ratio: head over base with all passes.
        base: what each pass did there: `name`, `changes`, `skips`.
        head: and here.
        files: that the change touches.
        budget: seconds for each comparison.
        tell: told what begins.

    Returns:
        `pass` (None for the model itself), `what` in words, and the `ladder` of ratios.
    """
    half = math.sqrt(ratio)
    ladder: list[dict[str, Any]] = []
    names = ["the model itself", *(entry["name"] for entry in head)]
    for rung in range(len(names)):
        if rung == len(names) - 1 and rung:
            found = ratio
        else:
            tell(f"cause: time {names[rung]}")
            found = _ratio(starts("base", rung, None), starts("head", rung, None), budget)
        ladder.append({"after": names[rung], "ratio": found})
        if found < half and rung < len(names) - 1:
            continue
        if rung == 0:
            return {"pass": None, "what": _module(starts, files, tell), "ladder": ladder}
        entry = head[rung - 1]
        other = base[rung - 1] if len(base) >= rung else {"changes": [], "skips": []}
        what = _lost(entry, other) or _bisected(starts, rung, entry, budget, tell)
        return {"pass": entry["name"], "what": what, "ladder": ladder}
    raise AssertionError("the last rung always holds it")


def _ratio(base: Callable[[], Worker], head: Callable[[], Worker], budget: float) -> float:
    return take_window({"base": base, "head": head}, budget=budget, tight=0.02, rounds=2).effect.ratio


def _module(starts: Starts, files: Sequence[str], tell: Callable[[str], None]) -> str:
    """The submodule whose own time grew most, by the profiler."""
    tell("cause: profile the modules")
    seconds: dict[str, dict[str, float]] = {}
    kinds: dict[str, str] = {}
    for side in ("base", "head"):
        with starts(side, 0, None)() as worker:
            found = worker.ask("modules")
        seconds[side] = {one["name"]: one["seconds"] for one in found}
        kinds |= {one["name"]: one["kind"] for one in found}
    grown = {name: took - seconds["base"].get(name, 0.0) for name, took in seconds["head"].items()}
    name = max(grown, key=lambda one: grown[one])
    before, after = 1e3 * seconds["base"].get(name, 0.0), 1e3 * seconds["head"][name]
    touched = f"; the change touches {', '.join(files[:_MOST_NAMED])}" if files else ""
    return (
        f"before any pass; '{name or '(root)'}' ({kinds[name]}) takes {after:.3g} ms instead of {before:.3g}, "
        f"without what is in it{touched}"
    )


def _lost(entry: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    """The changes that the base has and the head has not, with the reason where the pass gives one."""
    now = Counter((change["what"], change["where"]) for change in entry["changes"])
    gone = [change for change in other["changes"] if (change["what"], change["where"]) not in now]
    if not gone or len(other["changes"]) <= len(entry["changes"]):
        return None
    reasons = {skip["where"]: skip for skip in entry["skips"]}
    texts = []
    for change in gone[:_MOST_NAMED]:
        skip = reasons.get(change["where"])
        source = (skip or change)["source"]
        why = f": {skip['reason']}" if skip else ""
        texts.append(f"'{change['where']}'{f' ({source})' if source else ''} is no longer {change['what']}{why}")
    more = f", and {len(gone) - _MOST_NAMED} more" if len(gone) > _MOST_NAMED else ""
    return "; ".join(texts) + more


def _bisected(starts: Starts, rung: int, entry: Mapping[str, Any], budget: float, tell: Callable[[str], None]) -> str:
    """The change of the pass in the head with which its cost appears, by halving."""
    changes = entry["changes"]
    if not changes:
        return "it changes nothing here, in either side"
    whole = _ratio(starts("head", rung, 0), starts("head", rung, len(changes)), budget)
    if whole <= 1:
        return "none of its changes makes the head slower than it is without this pass: the base gains more by it"
    low, high = 0, len(changes)  # the cost is not there after `low` changes, and is there after `high`
    while high - low > 1:
        middle = (low + high) // 2
        tell(f"cause: time {entry['name']} up to change {middle} of {len(changes)}")
        if _ratio(starts("head", rung, 0), starts("head", rung, middle), budget) > math.sqrt(whole):
            high = middle
        else:
            low = middle
    change = changes[high - 1]
    source = f" ({change['source']})" if change["source"] else ""
    return f"'{change['where']}'{source} {change['what']}"
