"""FX306: naN or infinity in outputs or gradients."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Finding, Severity
from passes.audit.evidence import Evidence
from passes.audit.rule import Rule


class NotFinite(Rule):
    """NaN or infinity in outputs or gradients.

    One NaN in a gradient spoils all weights at the next step.

    Bad:
        torch.log(x - x.max())

    Good:
        torch.log_softmax(x, -1)

    Fix: guard the operator that is named.
    """

    id = "FX306"
    name = "not-finite"
    group = "numerics"
    severity = Severity.ERROR

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        seen, back = evidence.forward, evidence.backward
        for place, path, operator in seen.spoiled if seen else []:
            yield self.found(f"'{operator}' makes NaN or infinity of finite numbers", place, path)
        if back is not None and back.spoiled is not None and not (seen and seen.spoiled):
            operator, where = back.spoiled
            yield self.found(f"the gradient of '{operator}' is NaN or infinite", where)
