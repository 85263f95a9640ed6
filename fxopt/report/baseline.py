"""What the report of `fxopt baseline` says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxopt.report import words
from fxopt.report.section import Section, Table


def baseline_sections(record: Mapping[str, Any]) -> list[Section]:
    """Entries over time, each against the one before it on an equal machine."""
    rows, before = [], None
    for one in record["entries"]:
        other = one.get("differs")
        change = "" if before is None or other else words.change(one["median_ms"] / before["median_ms"])
        interval = f"[{words.duration(one['low_ms'])}, {words.duration(one['high_ms'])}]"
        note = f"another machine: {'; '.join(other)}" if other else ""
        rows.append((one["time"], one["commit"][:7], words.duration(one["median_ms"]), interval, change, note))
        before = before if other else one
    facts = [("target", record["target"])]
    if record["verdict"] is not None:
        facts.append(("verdict", f"{record['verdict']}, allowed are {words.effect(record['threshold'])}"))
    if record["band"] is not None:
        low, high = record["band"]
        facts.append(
            ("noise", f"between {words.duration(low)} and {words.duration(high)}: three deviations of the median")
        )
    notes: tuple[str, ...] = ()
    if record["verdict"] == "REGRESSION":
        notes = ("the speed of a machine wanders between two runs: `fxopt ci` measures both sides in one",)
    headings = ("time", "commit", "median", "95 % interval", "change", "")
    return [Section("fxopt baseline", tuple(facts), Table(headings, tuple(rows), (2, 4)), notes)]
