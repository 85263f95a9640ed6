"""FX304: a division by what can be zero."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Finding
from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import divisor, source
from passes.audit.rule import Rule

_NAMES = {"div", "div_", "true_divide", "__rdiv__", "__rtruediv__", "reciprocal"}


class UnguardedDivision(Rule):
    """A division by what can be zero.

    One row of zeros gives NaN, which spreads to the whole batch in the next norm.

    Bad:
        x / x.norm(dim=-1, keepdim=True)

    Good:
        x / (x.norm(dim=-1, keepdim=True) + 1e-5)

    Fix: add an epsilon, or clamp from below.
    """

    id = "FX304"
    name = "unguarded-division"
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
                yield self.found(f"'{maker}' is divided by, and can be 0", step.place, step.module)
