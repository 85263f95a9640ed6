"""What an inspection finds in a user's code, and the forms in which it is printed."""

from fxopt.findings.accept import Baseline
from fxopt.findings.finding import Finding, Fix, Place, Precision, Severity
from fxopt.findings.inspection import Inspection, Inspector, Subject
from fxopt.findings.layer import Layer
from fxopt.findings.render import render
from fxopt.findings.rule import RuleCard

__all__ = [
    "Baseline",
    "Finding",
    "Fix",
    "Inspection",
    "Inspector",
    "Layer",
    "Place",
    "Precision",
    "RuleCard",
    "Severity",
    "Subject",
    "render",
]
