"""For machines: everything that a finding says."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from fxopt.findings.finding import Finding
from fxopt.findings.inspection import Inspection
from fxopt.findings.layer import Layer
from fxopt.findings.rule import RuleCard


def as_json(found: Inspection, rules: Sequence[RuleCard]) -> str:
    """`{"findings": [...], "layers": [...], "notes": [...], "suppressed": n}`."""
    content = {
        "version": 1,
        "findings": [_plain(finding) for finding in found.findings],
        "layers": [_measured(layer) for layer in found.layers],
        "notes": list(found.notes),
        "suppressed": len(found.suppressed),
    }
    return json.dumps(content, indent=2) + "\n"


def _measured(layer: Layer) -> dict[str, Any]:
    # JSON has no NaN and no infinity.
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in vars(layer).items()}


def _plain(finding: Finding) -> dict[str, Any]:
    place = finding.place
    return {
        "rule": finding.rule,
        "severity": finding.severity.value,
        "precision": finding.precision.value,
        "message": finding.message,
        "path": place.shown() if place else None,
        "line": place.line if place else None,
        "column": place.column if place else None,
        "module": finding.module,
        "related": [
            {"path": each.shown(), "line": each.line, "column": each.column, "message": each.note}
            for each in finding.related
        ],
        "fix": finding.advice,
        "edit": finding.fix and {key: value for key, value in vars(finding.fix).items() if key != "path"},
    }
