"""FX407: a weight whose gradient is exactly zero."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Finding
from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import place_of
from passes.audit.rule import Rule


class DeadGradient(Rule):
    """A weight whose gradient is exactly zero.

    It never changes: everything behind it is cut off or saturated.

    Bad:
        torch.relu(self.fc(x) - 100)

    Good:
        torch.relu(self.fc(x))

    Fix: look at the activation behind it.
    """

    id = "FX407"
    name = "dead-gradient"
    group = "training"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        back, reported = evidence.backward, set()
        parameters = dict(evidence.subject.module.named_parameters()) if evidence.subject.module is not None else {}
        for name in sorted(back.dead) if back else []:
            path, _, leaf = name.rpartition(".")
            parameter = parameters[name]
            if parameter.dim() > 1 and bool((parameter != parameter.flatten()[0]).any()) and path not in reported:
                reported.add(path)
                yield self.found(f"the gradient of '{name}' is exactly 0", place_of(evidence, path, leaf), path)
