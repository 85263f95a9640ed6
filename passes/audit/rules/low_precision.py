"""FX305: a result that float16 or bfloat16 can't hold."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Finding, Severity
from passes.audit.evidence import Evidence
from passes.audit.rule import Rule


class LowPrecision(Rule):
    """A result that float16 or bfloat16 can't hold.

    Under autocast, or after `half()`, it becomes infinite or zero, and what follows is NaN.

    Bad:
        (x * 1000).pow(2).sum(-1)

    Good:
        x.pow(2).sum(-1)

    Fix: scale before, or compute this part in float32.
    """

    id = "FX305"
    name = "low-precision"
    group = "numerics"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        reported = set()
        for loss in evidence.half:
            if loss.place in reported:
                continue
            reported.add(loss.place)
            name = str(loss.dtype).removeprefix("torch.")
            message = f"'{loss.operator}' gives {loss.value:.1e}: {loss.kind} in {name}"
            if loss.kind == "error":
                message = f"in {name} the outputs differ by {loss.value:.0%} from float64"
            severity = Severity.WARNING if loss.kind == "overflow" else Severity.NOTE
            yield self.found(message, loss.place, loss.module, severity=severity)
