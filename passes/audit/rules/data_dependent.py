"""FX501: control flow that depends on the values of a tensor."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Finding, Severity
from passes.audit.evidence import Evidence
from passes.audit.evidence.decisions import in_decision
from passes.audit.rule import Rule

_READS = {"item", "__bool__", "__int__", "__float__", "__index__", "tolist"}


class DataDependent(Rule):
    """Control flow that depends on the values of a tensor.

    Export, tracing and compilation can follow one branch only, and the GPU waits at each decision.

    Bad:
        if x.sum() > 0:
            x = x * 2

    Good:
        x = torch.where(x.sum() > 0, x * 2, x)

    Fix: use `torch.where`, or `torch.cond`.
    """

    id = "FX501"
    name = "data-dependent"
    group = "deployment"
    severity = Severity.NOTE

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        reported = set()
        for step in evidence.forward.steps if evidence.forward else []:
            if step.place is None or step.name not in _READS or not in_decision(step.place):
                continue
            key = (step.place.path, step.place.line)
            if key not in reported:
                reported.add(key)
                yield self.found("the value of a tensor decides what runs", step.place, step.module)
