"""FX409: a ReLU that gives zeros only."""

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
