"""For a terminal: each finding with the line it is about, and a caret below."""

from __future__ import annotations

import linecache
from collections.abc import Sequence

from fxopt.findings.finding import Place, Severity
from fxopt.findings.inspection import Inspection
from fxopt.findings.rule import RuleCard


def text(found: Inspection, rules: Sequence[RuleCard]) -> str:
    """Findings, notes, and a count at the end."""
    blocks = []
    for finding in found.findings:
        where = f"{finding.place}: " if finding.place else ""
        module = f" [in '{finding.module}']" if finding.module else ""
        lines = [f"{where}{finding.severity.value} {finding.rule}: {finding.message}{module}"]
        lines += excerpt(finding.place)
        for place in finding.related:
            lines += [f"  {place}: {place.note or 'related'}", *excerpt(place)]
        lines += [f"  fix: {finding.advice}"] if finding.advice else []
        blocks.append("\n".join(lines))
    blocks += ["\n".join(f"note: {note}" for note in found.notes)] if found.notes else []
    return "\n\n".join([*blocks, counted(found)]) + "\n"


def excerpt(place: Place | None) -> list[str]:
    """The line at `place`, and carets below what is meant."""
    line = linecache.getline(place.path, place.line).rstrip() if place else ""
    if place is None or not line.strip():
        return []
    number = f"{place.line:>6} | "
    width = max(1, min(place.end_column or place.column + 1, len(line) + 1) - place.column)
    gap = "".join("\t" if char == "\t" else " " for char in line[: place.column - 1])
    return [number + line, " " * 6 + " | " + gap + "^" * width]


def counted(found: Inspection) -> str:
    """`2 errors, 1 warning; 3 suppressed`."""
    parts = []
    for severity in Severity:
        count = sum(finding.severity is severity for finding in found.findings)
        parts += [f"{count} {severity.value}{'s' if count != 1 else ''}"] if count else []
    accepted = f"; {len(found.suppressed)} suppressed" if found.suppressed else ""
    return (", ".join(parts) or "nothing found") + accepted
