"""FX404 and FX405: what is left of training in evaluation."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fxopt.findings import Place, Severity
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


@rule("FX405")
def random_in_eval(evidence: Evidence) -> Iterator[Found]:
    """Random numbers in evaluation.

    The same input gives another output in each call.

    Bad:
        F.dropout(x, 0.5)

    Good:
        F.dropout(x, 0.5, training=self.training)

    Fix: draw only where `self.training` is true.
    """
    seen = evidence.forward
    if not seen.differs:
        return
    # A dropout that stays in training mode has a rule of its own.
    places = [each for each in seen.random if not isinstance(evidence.module_at(each[1]), _DropoutNd)]
    places += _draws(evidence) if seen.draws_others else []
    for place, path in dict.fromkeys(places):
        if place is not None:
            yield Found("two runs in evaluation differ, since this draws random numbers", place, path)


def _draws(evidence: Evidence) -> Iterator[tuple[Place, str]]:
    """Where the text of a forward draws from the generators of Python and numpy: functions there are methods of one."""
    for body in evidence.bodies:
        for call in body.calls():
            owner = type(getattr(body.resolve(call.func), "__self__", None))
            if owner.__module__.startswith(("random", "numpy.random")):
                yield code.at(body.path, call), body.module
