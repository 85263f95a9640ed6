"""FX409 and FX411: an activation that gives zeros only, or is at its ends."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Severity
from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import called
from passes.audit.rule import Found, rule


@rule("FX409", Severity.NOTE)
def dead_activation(evidence: Evidence) -> Iterator[Found]:
    """A ReLU that gives zeros only.

    All in front of it gets no gradient, and all behind it no information.

    Bad:
        self.act(self.fc(x) - 100)

    Good:
        self.act(self.fc(x))

    Fix: look at the bias and the scale in front of it.
    """
    for (path, place), calls in called(evidence).items():
        if all(each.dead for each in calls):
            yield Found(f"all outputs of '{calls[0].name.strip('_')}' are 0", place, path)


_SHARE = 0.95


@rule("FX411")
def saturated_activation(evidence: Evidence) -> Iterator[Found]:
    """An activation at its ends.

    Where a sigmoid, tanh or softmax is flat, next to no gradient passes, and the layers in front hardly learn.

    Bad:
        torch.tanh(100 * self.fc(x))

    Good:
        torch.tanh(self.fc(x))

    Fix: scale what it is given: by the initial weights, a norm, or `1 / sqrt(dimension)` in attention.
    """
    for (path, place), calls in called(evidence).items():
        share = min(each.flat for each in calls)
        if share > _SHARE and evidence.settled:
            what = "rows" if calls[0].name == "softmax" else "outputs"
            message = f"{share:.0%} of the {what} of '{calls[0].name}' are where it is flat"
            yield Found(message, place, path)
