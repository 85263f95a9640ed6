"""FX602: a computation whose result nothing reads."""

from __future__ import annotations

from collections.abc import Iterator

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
