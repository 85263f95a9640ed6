"""JUnit XML: a test case a rule, failed where it found something worse than a note."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from fxopt.findings.finding import Severity
from fxopt.findings.inspection import Inspection
from fxopt.findings.rule import RuleCard

_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


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
        if own:
            lines = _ILLEGAL.sub("?", "\n".join(f"{finding.place}: {finding.message}" for finding in own))
            kind = {"message": f"{len(own)} x {rule.title}", "type": rule.name}
            ElementTree.SubElement(case, "failure", kind).text = lines
        notes = [finding for finding in found.findings if finding.rule == rule.id and finding not in failing]
        if notes:
            lines = _ILLEGAL.sub("?", "\n".join(f"{finding.place}: {finding.message}" for finding in notes))
            ElementTree.SubElement(case, "system-out").text = lines
    if found.notes:
        ElementTree.SubElement(suite, "system-out").text = _ILLEGAL.sub("?", "\n".join(found.notes))
    ElementTree.indent(top)
    return ElementTree.tostring(top, encoding="unicode", xml_declaration=True) + "\n"
