"""A table to paste."""

from __future__ import annotations

from collections.abc import Sequence

from fxopt.findings.inspection import Inspection
from fxopt.findings.render.text import counted
from fxopt.findings.rule import RuleCard
from fxopt.markdown import escaped


def markdown(found: Inspection, rules: Sequence[RuleCard]) -> str:
    """One row a finding."""
    lines = [f"**{counted(found)}**", ""]
    if found.findings:
        lines += ["| place | rule | severity | what | fix |", "|---|---|---|---|---|"]
    for finding in found.findings:
        cells = [str(finding.place or ""), finding.rule, finding.severity.value, finding.message]
        advice = finding.advice.replace("|", "\\|").replace("\n", " ")  # which is Markdown itself
        lines.append("| " + " | ".join([*map(escaped, cells), advice]) + " |")
    lines += ["", *(f"- {escaped(note)}" for note in found.notes)] if found.notes else []
    return "\n".join(lines) + "\n"
