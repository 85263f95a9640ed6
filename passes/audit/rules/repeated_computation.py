"""FX603: a computation that was done before."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from fxopt.findings import Finding, Severity
from passes.audit.evidence import Evidence
from passes.audit.rule import Rule


class RepeatedComputation(Rule):
    """A computation that was done before.

    The same call on the same tensors gives the same result, at twice the cost.

    Bad:
        return self.head(self.body(x)), self.aux(self.body(x))

    Good:
        h = self.body(x)
        return self.head(h), self.aux(h)

    Fix: keep the result in a variable.
    """

    id = "FX603"
    name = "repeated-computation"
    group = "speed"
    severity = Severity.NOTE

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        reported = set()
        for spot in evidence.graph.repeated:
            if spot.place is None or spot.place in reported:
                continue
            reported.add(spot.place)
            first = (dataclasses.replace(spot.earlier, note="it was computed here"),) if spot.earlier else ()
            yield self.found(f"'{spot.what}' computes the same once more", spot.place, spot.module, first)
