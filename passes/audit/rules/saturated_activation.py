"""FX411: an activation at its ends."""

from __future__ import annotations

from collections.abc import Iterator

from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import called
from passes.audit.rule import Found, rule

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
