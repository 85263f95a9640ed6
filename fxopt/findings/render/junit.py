"""JUnit XML: a test case a rule, failed where it found something worse than a note."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from xml.etree import ElementTree

from fxopt.findings.finding import Finding, Severity
from fxopt.findings.inspection import Inspection
from fxopt.findings.rule import RuleCard
from fxopt.xml import legal


def junit(found: Inspection, rules: Sequence[RuleCard]) -> str:
    """One suite."""
    failing = [finding for finding in found.findings if finding.severity is not Severity.NOTE]
    failed = {finding.rule for finding in failing}
    counts = {"tests": str(len(rules)), "failures": str(len(failed)), "errors": "0", "skipped": "0"}
    top = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(top, "testsuite", {"name": "fxopt audit", **counts})
    for rule in rules:
        case = ElementTree.SubElement(suite, "testcase", {"classname": f"fxopt.{rule.group}", "name": rule.id})
        own = [finding for finding in failing if finding.rule == rule.id]
        _say(case, "failure", map(_line, own), {"message": f"{len(own)} x {rule.title}", "type": rule.name})
        notes = (finding for finding in found.findings if finding.rule == rule.id and finding not in failing)
        _say(case, "system-out", map(_line, notes))
    _say(suite, "system-out", found.notes)
    ElementTree.indent(top)
    return ElementTree.tostring(top, encoding="unicode", xml_declaration=True) + "\n"


def _line(finding: Finding) -> str:
    module = f"'{finding.module}'" if finding.module else "the model"
    return f"{finding.place or module}: {finding.message}"


def _say(about: ElementTree.Element, tag: str, lines: Iterable[str], kind: Mapping[str, str] | None = None) -> None:
    """Add an element that holds the lines, where there are any."""
    text = legal("\n".join(lines))
    if text:
        ElementTree.SubElement(about, tag, dict(kind or {})).text = text
