"""FX508: control flow that depends on the shape of an input."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Severity
from passes.audit.evidence import Evidence
from passes.audit.rule import Found, rule


@rule("FX508", Severity.NOTE, once_a_line=True)
def shape_decision(evidence: Evidence) -> Iterator[Found]:
    """Control flow that depends on the shape of an input.

    A graph holds one of the branches only: for other shapes, an exported model raises, or computes the wrong thing.

    Bad:
        if x.shape[0] == 1:
            x = x * 2

    Good:
        # one computation for every batch size

    Fix: compute the same for every shape, or export one model for each side of the decision.
    """
    for guard in evidence.graph.guards:
        if guard.place is not None:
            yield Found(f"a graph holds only where `{guard.what}`", guard.place, guard.module)
