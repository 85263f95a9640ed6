"""FX409: a ReLU that gives zeros only."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Finding, Severity
from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import place_of
from passes.audit.rule import Rule


class DeadActivation(Rule):
    """A ReLU that gives zeros only.

    All in front of it gets no gradient, and all behind it no information.

    Bad:
        self.act(self.fc(x) - 100)

    Good:
        self.act(self.fc(x))

    Fix: look at the bias and the scale in front of it.
    """

    id = "FX409"
    name = "dead-activation"
    group = "training"
    severity = Severity.NOTE

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        for path, share in evidence.forward.zeros.items() if evidence.forward else []:
            if share == 1.0:
                yield self.found(f"all outputs of '{path}' are 0", place_of(evidence, path, ""), path)
