"""What a gate holds a change to besides the latency."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from fxopt.gate import lock
from fxopt.gate.settings import Limits

_FALLS = frozenset("loss error err perplexity ppl nll mse rmse mae mape wer cer eer fid lpips".split())
"""Metrics with one of these words in their names are better when they are smaller."""


@dataclass(frozen=True)
class Check:
    """One thing that was held to a limit.

    Attributes:
        name: of the thing.
        status: "ok", "failed", or "not checked".
        before: in words.
        after: in words.
        message: what is wrong, or why it was not checked; "" where it is fine.
    """

    name: str
    status: str
    before: str
    after: str
    message: str = ""


def all_checks(
    base: Mapping[str, Any],
    head: Mapping[str, Any],
    limits: Limits,
    locked: lock.Counts | None,
    lower_is_better: Collection[str] = (),
) -> list[Check]:
    """Every check but that of the latency, on what `Side.facts` gives of either side."""
    checks = _metrics(base["metrics"], head["metrics"], limits.metrics, lower_is_better)
    checks.append(_output_error(head.get("output_error"), limits.output_error))
    for name, key, limit in (("peak memory", "peak_memory", limits.memory), ("size", "bytes", limits.size)):
        checks.append(_growth(name, base["size"][key], head["size"][key], limit))
    if head["coverage"] is not None:
        checks += _coverage(base["coverage"] or {}, head["coverage"], limits.coverage)
        checks.append(_matches(locked, lock.count(head["passes"])))
    return checks


def _metrics(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, limit: float, falling: Collection[str]
) -> list[Check]:
    checks = []
    for name in dict.fromkeys([*(before or {}), *(after or {})]):
        one, two = (before or {}).get(name), (after or {}).get(name)
        texts = (_number(one), _number(two))
        if one is None:
            checks.append(Check(name, "not checked", *texts, "the base does not measure it"))
        elif two is None:
            checks.append(Check(name, "failed", *texts, f"'evaluate' gives no '{name}' any more"))
        elif isinstance(two, str):
            checks.append(Check(name, "ok" if one == two else "failed", *texts, f"it is {two}" if one != two else ""))
        elif isinstance(one, str):
            checks.append(Check(name, "not checked", *texts, f"it is {one} in the base"))
        else:
            falls = name in falling or not _FALLS.isdisjoint(re.split("[^a-z0-9]+", name.lower()))
            loss = two - one if falls else one - two
            message = f"it is worse by {loss:.3g}, allowed are {limit:g}" if loss > limit else ""
            checks.append(Check(name, "failed" if message else "ok", *texts, message))
    return checks


def _output_error(found: float | str | None, limit: float | None) -> Check:
    if found is None or isinstance(found, str):
        why = found or "the outputs were not compared"
        # Who sets a limit wants to know where it could not be held.
        return Check("output error", "not checked" if limit is None else "failed", "", "-", why)
    text = f"{found:.1e}" if found else "0"
    if limit is None:
        return Check("output error", "not checked", "", text, "no limit is set: outputs may change")
    over = not found <= limit
    return Check("output error", "failed" if over else "ok", "", text, f"allowed are {limit:.1e}" if over else "")


def _growth(name: str, before: int | None, after: int | None, limit: float) -> Check:
    texts = (_bytes(before), _bytes(after))
    if before is None or after is None:
        return Check(name, "not checked", *texts, "it can't be measured for what runs here")
    if after > before * (1 + limit) and after - before > 1024:
        growth = f"{100 * (after / before - 1):.1f} % more" if before else "from nothing"
        return Check(name, "failed", *texts, f"{growth}, allowed are {100 * limit:.1f} %")
    return Check(name, "ok", *texts)


def _coverage(before: Mapping[str, float], after: Mapping[str, float], limit: float) -> list[Check]:
    checks = []
    for name, share in after.items():
        had = before.get(name)
        texts = ("-" if had is None else f"{100 * had:.1f} %", f"{100 * share:.1f} %")
        fell = had is not None and had - share > limit
        message = f"the graph shows less of the module; allowed are {100 * limit:.1f} points" if fell else ""
        checks.append(Check(f"coverage, {name.replace('_', ' ')}", "failed" if fell else "ok", *texts, message))
    return checks


def _matches(locked: lock.Counts | None, now: lock.Counts) -> Check:
    total = str(sum(sum(kinds.values()) for kinds in now.values()))
    if locked is None:
        return Check("matches", "not checked", "", total, f"not held to '{lock.FILE}', which `--update-lock` writes")
    before = str(sum(sum(kinds.values()) for kinds in locked.values()))
    gone = lock.lost(locked, now)
    if gone:
        return Check("matches", "failed", before, total, "; ".join(gone))
    grown = "more fire than the lock file says: `fxopt ci --update-lock`" if locked != now else ""
    return Check("matches", "ok", before, total, grown)


def _number(value: float | str | None) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _bytes(value: int | None) -> str:
    return "-" if value is None else f"{value:,} bytes"
