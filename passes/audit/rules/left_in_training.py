"""FX404: a norm or dropout that stays in training mode after `eval()`."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fxopt.findings import Severity
from passes.audit.evidence import Evidence, code
from passes.audit.evidence.driver import copied
from passes.audit.evidence.trail import place_of
from passes.audit.rule import Found, rule


@rule("FX404", Severity.ERROR, once_a_line=True)
def left_in_training(evidence: Evidence) -> Iterator[Found]:
    """A norm or dropout that stays in training mode after `eval()`.

    Outputs then depend on the batch, or on chance.

    Bad:
        def train(self, mode=True):
            return self

    Good:
        def train(self, mode=True):
            return super().train(mode)

    Fix: let `train()` reach every submodule.
    """
    if evidence.subject.module is None:
        return
    for path, module in copied(evidence.subject, training=False).named_modules():
        if module.training and isinstance(module, (_BatchNorm, _DropoutNd)):
            methods = (method for _, owner in evidence.owner(path) for method in code.methods(type(owner)))
            stops = (code.at(file, function) for file, function in methods if function.name == "train")
            place = next(stops, None) or place_of(evidence, path, "")
            yield Found(f"'{path}' is in training mode after `eval()`", place, path)
