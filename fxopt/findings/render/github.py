"""Workflow commands that GitHub shows as annotations on the changed lines."""

from __future__ import annotations

from collections.abc import Sequence

from fxopt.findings.inspection import Inspection
from fxopt.findings.rule import RuleCard

_COMMANDS = {"error": "error", "warning": "warning", "note": "notice"}


def github(found: Inspection, rules: Sequence[RuleCard]) -> str:
    """`::error file=model.py,line=41,col=9,title=FX101::message` a finding, and a notice a note."""
    lines = []
    for finding in found.findings:
        place = finding.place
        where = f"file={_value(place.shown())},line={place.line},col={place.column}," if place else ""
        message = _data(f"{finding.message}; {finding.advice}" if finding.advice else finding.message)
        lines.append(f"::{_COMMANDS[finding.severity.value]} {where}title={finding.rule}::{message}")
    lines += [f"::notice title=fxopt audit::{_data(note)}" for note in found.notes]
    return "".join(f"{line}\n" for line in lines)


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _value(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
