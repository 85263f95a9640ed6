"""FX301: an epsilon that is zero in float16."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Finding
from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import DANGEROUS, divisor, epsilon, through
from passes.audit.rule import Rule


class EpsilonUnderflows(Rule):
    """An epsilon that is zero in float16.

    Below 6e-8 a number rounds to zero in float16: the guard against a division by zero is gone.

    Bad:
        x / (x.norm(dim=-1, keepdim=True) + 1e-8)

    Good:
        x / (x.norm(dim=-1, keepdim=True) + 1e-5)

    Fix: use 1e-5, or compute this part in float32.
    """

    id = "FX301"
    name = "epsilon-underflows"
    group = "numerics"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        seen = evidence.forward
        made, reported = (seen.made() if seen else {}), set()
        for step in seen.steps if seen else []:
            operand = divisor(step) if step.name in DANGEROUS else None
            behind = made.get(operand.number) if operand is not None else None
            guard = next((each for each in through(behind, made) if epsilon(each)), None)
            if guard is None or guard.place is None or epsilon(guard) >= 2.9e-8:
                continue
            key = (guard.place.path, guard.place.line)
            if key not in reported:
                reported.add(key)
                message = f"{epsilon(guard):g} is 0 in float16, and '{step.name.strip('_')}' relies on it"
                yield self.found(message, guard.place, step.module)
