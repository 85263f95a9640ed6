"""FX410: a forward that raises."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Finding, Severity
from passes.audit.evidence import Evidence
from passes.audit.rule import Rule


class ForwardFails(Rule):
    """A forward that raises.

    The model does not run with the inputs that were given.

    Bad:
        self.fc = nn.Linear(8, 8)  # given 4 features

    Good:
        self.fc = nn.Linear(4, 8)

    Fix: look at the line, or give other inputs by `--input`.
    """

    id = "FX410"
    name = "forward-fails"
    group = "training"
    severity = Severity.ERROR

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        if evidence.forward is not None and evidence.forward.error is not None:
            error, place = evidence.forward.error
            first = (str(error).splitlines() or ["no message"])[0]
            yield self.found(f"the forward raises {type(error).__name__}: {first}", place)
