"""audit: faults in buffers, devices, registration, numerics, training and deployment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from fxopt.contract import Change, Promise, Skip
from fxopt.errors import SpecError
from fxopt.findings import Finding, Inspection, Inspector, RuleCard, Severity, Subject
from fxopt.graph import GraphModule, Region
from fxopt.inputs import Inputs
from passes.audit.evidence import Evidence
from passes.audit.rules import RULES


@dataclass(frozen=True)
class Audit(Inspector):
    """Finds faults in buffers, devices, registration, numerics and training; changes nothing.

    `fxopt audit` looks at the module as the user wrote it, and finds the most. In a pipeline the pass looks at
    the captured module, and lists each finding among the places that were left alone.
    """

    name: ClassVar[str] = "audit"
    promise: ClassVar[Promise] = Promise.EXACT

    rules_off: str = field(default="", metadata={"help": "ids of rules that are left out, with spaces between"})

    def __post_init__(self) -> None:
        unknown = set(self.rules_off.split()) - {rule.id for rule in RULES}
        if unknown:
            raise SpecError(f"audit: unknown rules {sorted(unknown)}; `fxopt audit --rules` lists them all")

    @classmethod
    def rules(cls) -> tuple[RuleCard, ...]:
        """The cards of all rules."""
        return tuple(rule.card for rule in RULES)

    def inspect(self, subject: Subject) -> Inspection:
        """Offer the evidence to each rule. A rule that fails is a note, not an end."""
        findings: list[Finding] = []
        notes: list[str] = []
        with Evidence(subject) as evidence:
            # Rules on devices wait for a run in a process of its own, which goes on meanwhile.
            for rule in sorted(RULES, key=lambda rule: rule.card.group == "device"):
                if rule.id in self.rules_off.split():
                    continue
                try:
                    findings.extend(rule.check(evidence))
                except Exception as error:  # whatever a user's class raises when it is looked at
                    notes.append(f"{subject.name}: {rule.id} could not look: {type(error).__name__}: {error}")
            layers = tuple(evidence.layers())
        return Inspection.joined([Inspection(tuple(findings), (*evidence.notes, *notes), layers=layers)])

    def run(self, region: Region) -> Iterator[Change | Skip]:
        """Nothing: a graph by itself says too little."""
        return iter(())

    def finish(self, module: GraphModule, calibration: Iterable[Inputs]) -> Iterator[Change | Skip]:
        """Look at the captured module, and run it where there are inputs."""
        inputs = next(iter(calibration), None)
        for finding in self.inspect(Subject("the captured module", module, inputs)).findings:
            if finding.severity is not Severity.NOTE:
                source = f"{finding.place.shown()}:{finding.place.line}" if finding.place else ""
                yield Skip(finding.module or "the module", f"{finding.rule}: {finding.message}", source)
