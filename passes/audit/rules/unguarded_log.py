"""FX303: a logarithm of what can be zero."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Finding
from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import divisor, source
from passes.audit.rule import Rule

_NAMES = {"log", "log2", "log10"}


class UnguardedLog(Rule):
    """A logarithm of what can be zero.

    It is minus infinity at zero; a softmax or sigmoid underflows to zero in float16.

    Bad:
        torch.softmax(x, -1).log()

    Good:
        torch.log_softmax(x, -1)

    Fix: use the function that fuses both (`log_softmax`, `logsigmoid`), or clamp first.
    """

    id = "FX303"
    name = "unguarded-log"
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
                yield self.found(f"the logarithm of '{maker}' is -inf where that is 0", step.place, step.module)
