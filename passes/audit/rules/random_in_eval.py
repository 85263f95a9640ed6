"""FX405: random numbers in evaluation."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn.modules.dropout import _DropoutNd

from fxopt.findings import Finding
from passes.audit.evidence import Evidence
from passes.audit.rule import Rule


class RandomInEval(Rule):
    """Random numbers in evaluation.

    The same input gives another output in each call.

    Bad:
        F.dropout(x, 0.5)

    Good:
        F.dropout(x, 0.5, training=self.training)

    Fix: draw only where `self.training` is true.
    """

    id = "FX405"
    name = "random-in-eval"
    group = "training"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        seen = evidence.forward
        for place, path in dict.fromkeys(seen.random) if seen and seen.differs else []:
            # A dropout that stays in training mode has a rule of its own.
            if place is not None and not isinstance(evidence.module_at(path), _DropoutNd):
                yield self.found("two runs in evaluation differ, since this draws random numbers", place, path)
