"""FX506: a batch norm without running statistics."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn.modules.batchnorm import _BatchNorm

from fxopt.findings import Finding
from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import place_of
from passes.audit.rule import Rule


class BatchStatistics(Rule):
    """A batch norm without running statistics.

    In evaluation it uses the statistics of the batch at hand: outputs depend on what else is in the batch.

    Bad:
        nn.BatchNorm2d(8, track_running_stats=False)

    Good:
        nn.BatchNorm2d(8)

    Fix: track the statistics, or use GroupNorm.
    """

    id = "FX506"
    name = "batch-statistics"
    group = "deployment"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        for path, module in evidence.modules:
            if isinstance(module, _BatchNorm) and module.running_mean is None:
                yield self.found(f"'{path}' has no running statistics", place_of(evidence, path, ""), path)
