"""FX603: a computation that was done before."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from fxopt.findings import Severity
from passes.audit.evidence import Evidence
from passes.audit.rule import Found, rule


@rule("FX603", Severity.NOTE, once_a_line=True)
def repeated_computation(evidence: Evidence) -> Iterator[Found]:
    """A computation that was done before.

    The same call on the same tensors gives the same result, at twice the cost.

    Bad:
        return self.head(self.body(x)), self.aux(self.body(x))

    Good:
        h = self.body(x)
        return self.head(h), self.aux(h)

    Fix: keep the result in a variable.
    """
    for spot in evidence.graph.repeated:
        first = (dataclasses.replace(spot.earlier, note="it was computed here"),) if spot.earlier else ()
        if spot.place is not None:
            yield Found(f"'{spot.what}' computes the same once more", spot.place, spot.module, first)
