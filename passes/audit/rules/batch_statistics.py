"""FX506: a batch norm without running statistics."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn.modules.batchnorm import _BatchNorm

from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import place_of
from passes.audit.rule import Found, rule


@rule("FX506")
def batch_statistics(evidence: Evidence) -> Iterator[Found]:
    """A batch norm without running statistics.

    In evaluation it uses the statistics of the batch at hand: outputs depend on what else is in the batch.

    Bad:
        nn.BatchNorm2d(8, track_running_stats=False)

    Good:
        nn.BatchNorm2d(8)

    Fix: track the statistics, or use GroupNorm.
    """
    for path, module in evidence.modules:
        if isinstance(module, _BatchNorm) and module.running_mean is None:
            yield Found(f"'{path}' has no running statistics", place_of(evidence, path, ""), path)
