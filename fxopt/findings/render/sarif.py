"""SARIF 2.1.0, as GitHub code scanning wants it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from fxopt.findings.accept import fingerprints
from fxopt.findings.finding import Finding, Place
from fxopt.findings.inspection import Inspection
from fxopt.findings.rule import RuleCard
from fxopt.version import __version__

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_PRECISION = {"high": "very-high", "medium": "medium", "low": "low"}


def sarif(found: Inspection, rules: Sequence[RuleCard]) -> str:
    """One run; each finding a result, what comments accept as suppressed results."""
    index = {rule.id: number for number, rule in enumerate(rules)}
    everything = [*found.findings, *found.suppressed]
    marks = fingerprints(everything)
    results = [_result(finding, index, mark) for finding, mark in zip(everything, marks, strict=True)]
    for result in results[len(found.findings) :]:
        result["suppressions"] = [{"kind": "inSource"}]
    notes = [{"level": "note", "message": {"text": note}} for note in found.notes]
    run = {
        "tool": {"driver": {"name": "fxopt", "version": __version__, "rules": [_rule(rule) for rule in rules]}},
        "columnKind": "unicodeCodePoints",
        "invocations": [{"executionSuccessful": True, "toolExecutionNotifications": notes}],
        "results": results,
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _rule(rule: RuleCard) -> dict[str, Any]:
    return {
        "id": rule.id,
        "name": "".join(word.capitalize() for word in rule.name.split("-")),
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.why},
        "help": {"text": rule.text(), "markdown": rule.markdown()},
        "defaultConfiguration": {"level": rule.severity.value},
        "properties": {"precision": _PRECISION[rule.precision.value], "tags": [rule.group]},
    }


def _result(finding: Finding, index: dict[str, int], mark: str) -> dict[str, Any]:
    message = f"{finding.message}; {finding.advice}" if finding.advice else finding.message
    result: dict[str, Any] = {
        "ruleId": finding.rule,
        "level": finding.severity.value,
        "message": {"text": message},
        "partialFingerprints": {"primaryLocationLineHash": mark},
        "properties": {"precision": finding.precision.value, "module": finding.module},
    }
    if finding.rule in index:
        result["ruleIndex"] = index[finding.rule]
    if finding.place is not None:
        result["locations"] = [_location(finding.place)]
    if finding.related:
        result["relatedLocations"] = [
            {"id": number, **_location(place), "message": {"text": place.note or "related"}}
            for number, place in enumerate(finding.related, 1)
        ]
    return result


def _location(place: Place) -> dict[str, Any]:
    region = {"startLine": place.line, "startColumn": place.column}
    if place.end_column > place.column:
        region["endColumn"] = place.end_column
    return {"physicalLocation": {"artifactLocation": {"uri": _uri(place.shown())}, "region": region}}


def _uri(path: str) -> str:
    name = quote(path)
    if path.startswith("/"):
        return f"file://{name}"
    return f"file:///{name}" if path[1:2] == ":" else name
