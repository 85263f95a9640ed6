"""FX501 and FX508: control flow that depends on values, or on shapes."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Severity
from passes.audit.evidence import Evidence
from passes.audit.evidence.decisions import in_decision
from passes.audit.rule import Found, rule

_READS = {"item", "__bool__", "__int__", "__float__", "__index__", "tolist"}


@rule("FX501", Severity.NOTE, once_a_line=True)
def data_dependent(evidence: Evidence) -> Iterator[Found]:
    """Control flow that depends on the values of a tensor.

    Export, tracing and compilation can follow one branch only, and the GPU waits at each decision.

    Bad:
        if x.sum() > 0:
            x = x * 2

    Good:
        x = torch.where(x.sum() > 0, x * 2, x)

    Fix: use `torch.where`, or `torch.cond`.
    """
    for step in evidence.forward.steps:
        if step.name in _READS and step.place is not None and in_decision(step.place):
            yield Found("the value of a tensor decides what runs", step.place, step.module)


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
