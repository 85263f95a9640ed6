"""FX405: random numbers in evaluation."""

from __future__ import annotations

from collections.abc import Iterator

from torch.nn.modules.dropout import _DropoutNd

from fxopt.findings import Place
from passes.audit.evidence import Evidence, code
from passes.audit.rule import Found, rule


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
