"""FX302: a square root of what can be zero."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Finding
from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import divisor, source
from passes.audit.rule import Rule

_NAMES = {"sqrt", "rsqrt", "sqrt_"}


class UnguardedSqrt(Rule):
    """A square root of what can be zero.

    Its gradient is infinite at zero, and its reciprocal is too.

    Bad:
        x.var(-1).sqrt()

    Good:
        (x.var(-1) + 1e-5).sqrt()

    Fix: add an epsilon before the root.
    """

    id = "FX302"
    name = "unguarded-sqrt"
    group = "numerics"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        reported = set()
        for step, made in evidence.forward.made() if evidence.forward else ():
            operand = divisor(step) if step.name in _NAMES else None
            maker = source(operand, made, step.name) if operand is not None else ""
            key = (step.place.path, step.place.line) if step.place else None
            if maker and key is not None and key not in reported:
                reported.add(key)
                yield self.found(f"the root of '{maker}' has an infinite gradient at 0", step.place, step.module)
