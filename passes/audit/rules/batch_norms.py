"""FX506 and FX601: a batch norm without running statistics, and a bias in front of one."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxopt.findings import Severity
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


_LAYERS = ("conv1d", "conv2d", "conv3d", "linear")
_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@rule("FX601", Severity.NOTE)
def bias_before_norm(evidence: Evidence) -> Iterator[Found]:
    """A bias that the batch norm behind it takes out again.

    It costs memory and time, and its gradient is zero but for rounding.

    Bad:
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)

    Good:
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)

    Fix: pass `bias=False`.
    """
    seen = evidence.forward
    readers: dict[int, list[str]] = {}
    layers: dict[str, set[int]] = {}
    for step in seen.steps:
        if step.name in _LAYERS:
            layers.setdefault(step.module, set()).update(step.outputs)
        for value in step.inputs if step.outputs else []:  # what gives no tensor asks for the shape
            readers.setdefault(value.number, []).append(step.name)
    for path, outputs in layers.items():
        module = evidence.module_at(path)
        read = [name for number in outputs for name in readers.get(number, ["nothing"])]
        only_norms = set(read) == {"batch_norm"} and not outputs & seen.returned
        if only_norms and isinstance(module, _KINDS) and module.bias is not None:
            yield Found(f"the bias of '{path}' has no effect", place_of(evidence, path, ""), path)
