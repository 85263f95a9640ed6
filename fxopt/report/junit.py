"""A gate as JUnit XML: a suite a target, a case a check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

from fxopt.report.ci import cause, verdict_row
from fxopt.xml import legal


def junit(record: Mapping[str, Any]) -> str:
    """The record of `fxopt ci` as XML. What can't be told is skipped; what the tool could not do is an error."""
    top = ElementTree.Element("testsuites", {"name": "fxopt ci"})
    for target in record["targets"]:
        suite = ElementTree.SubElement(top, "testsuite", {"name": legal(target["name"])})
        _latency_case(suite, target)
        for check in target["checks"]:
            case = _case(suite, target, check["name"])
            if check["status"] == "failed":
                _said(case, "failure", check["message"], f"{check['before']} -> {check['after']}")
            elif check["status"] == "not checked":
                _said(case, "skipped", check["message"])
        _count(suite)
        suite.set("time", f"{target['seconds']:.3f}")
    _count(top)
    ElementTree.indent(top)
    return ElementTree.tostring(top, encoding="unicode", xml_declaration=True) + "\n"


def _latency_case(suite: ElementTree.Element, target: Mapping[str, Any]) -> None:
    case, latency = _case(suite, target, "latency"), target["latency"]
    case.set("time", f"{latency['seconds'] if latency else 0:.3f}")
    if latency is None:
        kind = {"failed": "error", "wrong call": "error"}.get(target["verdict"], "skipped")
        if target["verdict"] == "REGRESSION" and target["notes"]:
            kind = "failure"
        _said(case, kind, "; ".join(target["notes"]) or "not measured")
    elif latency["verdict"] == "REGRESSION":
        _said(case, "failure", f"{' '.join(verdict_row(target)[2:5])}{cause(target)}")
    elif latency["verdict"] == "INCONCLUSIVE":
        _said(case, "skipped", f"inconclusive: {'; '.join(target['notes'])}")


def _case(suite: ElementTree.Element, target: Mapping[str, Any], name: str) -> ElementTree.Element:
    return ElementTree.SubElement(suite, "testcase", {"classname": legal(target["name"]), "name": legal(name)})


def _said(case: ElementTree.Element, kind: str, message: str, text: str = "") -> None:
    found = ElementTree.SubElement(case, kind, {"message": legal(message)})
    found.text = legal(text) or None


def _count(element: ElementTree.Element) -> None:
    element.set("tests", str(len(list(element.iter("testcase")))))
    for key, kind in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        element.set(key, str(len(list(element.iter(kind)))))
