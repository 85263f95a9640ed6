"""FX306: naN or infinity in outputs or gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fxopt.findings import Finding, Severity
from passes.audit.evidence import Evidence
from passes.audit.evidence.spread import Spread
from passes.audit.rule import Rule


def _is_finite(found: Spread) -> bool:
    return math.isfinite(found.low) and math.isfinite(found.high)


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
        # What is left out again, as by `torch.where`, harms at most the gradients.
        harmless = seen is None or (bool(seen.results) and all(map(_is_finite, seen.results)))
        spoiled = seen.spoiled if seen is not None and not harmless else []
        for place, path, operator in spoiled:
            yield self.found(f"'{operator}' makes NaN or infinity of finite numbers", place, path)
        if back is not None and back.spoiled is not None and not spoiled:
            operator, where = back.spoiled
            yield self.found(f"the gradient of '{operator}' is NaN or infinite", where)
