"""FX501: control flow that depends on the values of a tensor."""

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
