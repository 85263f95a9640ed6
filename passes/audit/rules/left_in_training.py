"""FX404: a norm or dropout that stays in training mode after `eval()`."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fxopt.findings import Finding, Place, Severity
from passes.audit.evidence import Evidence, code
from passes.audit.evidence.driver import copied
from passes.audit.evidence.trail import place_of
from passes.audit.rule import Rule


def _method(kind: type) -> Place | None:
    for _, path, node in code.bases(kind):
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "train":
                return code.at(path, item)
    return None


class LeftInTraining(Rule):
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

    id = "FX404"
    name = "left-in-training"
    group = "training"
    severity = Severity.ERROR

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        duplicate = copied(evidence.subject, training=False) if evidence.subject.module is not None else None
        reported = set()
        for path, module in duplicate.named_modules() if duplicate is not None else []:
            if module.training and isinstance(module, (_BatchNorm, _DropoutNd)):
                methods = [_method(type(owner)) for _, owner in evidence.owner(path)]
                place = next((each for each in methods if each is not None), None) or place_of(evidence, path, "")
                if place not in reported:
                    reported.add(place)
                    yield self.found(f"'{path}' is in training mode after `eval()`", place, path)
