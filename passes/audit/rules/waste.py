"""FX602 and FX603: what is computed for nothing, or twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from fxopt.findings import Severity
from passes.audit.evidence import Evidence, code
from passes.audit.rule import Found, rule


@rule("FX602", once_a_line=True)
def unused_result(evidence: Evidence) -> Iterator[Found]:
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
    kept = {(body.path, line) for body in evidence.bodies for line in code.kept(body)}
    for spot in evidence.graph.idle:
        if spot.place is not None and (spot.place.path, spot.place.line) not in kept:
            yield Found(f"nothing reads the result of '{spot.what}'", spot.place, spot.module)


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
