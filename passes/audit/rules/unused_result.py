"""FX602: a computation whose result nothing reads."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Finding
from passes.audit.evidence import Evidence, code
from passes.audit.rule import Rule


class UnusedResult(Rule):
    """A computation whose result nothing reads.

    It costs time, and mostly something was meant to be done with it. What is kept on `self` may be read later, and
    what is printed is read.

    Bad:
        gate = torch.sigmoid(self.gate(x))
        return self.body(x)

    Good:
        gate = torch.sigmoid(self.gate(x))
        return gate * self.body(x)

    Fix: use the result, or remove the computation.
    """

    id = "FX602"
    name = "unused-result"
    group = "speed"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        reported = set()
        kept = {(body.path, line) for body in evidence.bodies for line in code.kept(body)}
        for spot in evidence.graph.idle:
            if spot.place is None or (spot.place.path, spot.place.line) in kept:
                continue
            if spot.place not in reported:
                reported.add(spot.place)
                yield self.found(f"nothing reads the result of '{spot.what}'", spot.place, spot.module)
