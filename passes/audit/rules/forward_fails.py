"""FX410: a forward that raises."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.capture.blame import advice_on
from fxopt.findings import Severity
from passes.audit.evidence import Evidence
from passes.audit.rule import Found, rule


@rule("FX410", Severity.ERROR)
def forward_fails(evidence: Evidence) -> Iterator[Found]:
    """A forward that raises.

    The model does not run with the inputs that were given.

    Bad:
        self.fc = nn.Linear(8, 8)  # given 4 features

    Good:
        self.fc = nn.Linear(4, 8)

    Fix: look at the line, or give other inputs by `--input`.
    """
    if evidence.forward.error is not None:
        error, place = evidence.forward.error
        first = (str(error).splitlines() or ["no message"])[0]
        yield Found(f"the forward raises {type(error).__name__}: {first}{advice_on(error)}", place)
