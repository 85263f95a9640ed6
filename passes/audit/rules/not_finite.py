"""FX306: naN or infinity in outputs or gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

from fxopt.findings import Severity
from passes.audit.evidence import Evidence
from passes.audit.evidence.spread import Spread
from passes.audit.rule import Found, rule


def _is_finite(found: Spread) -> bool:
    return math.isfinite(found.low) and math.isfinite(found.high)


@rule("FX306", Severity.ERROR)
def not_finite(evidence: Evidence) -> Iterator[Found]:
    """NaN or infinity in outputs or gradients.

    One NaN in a gradient spoils all weights at the next step.

    Bad:
        torch.log(x - x.max())

    Good:
        torch.log_softmax(x, -1)

    Fix: guard the operator that is named.
    """
    seen, back = evidence.forward, evidence.backward
    # What is left out again, as by `torch.where`, harms at most the gradients.
    spoiled = [] if seen.results and all(map(_is_finite, seen.results)) else seen.spoiled
    for place, path, operator in spoiled:
        yield Found(f"'{operator}' makes NaN or infinity of finite numbers", place, path)
    if back.spoiled is not None and not spoiled:
        operator, where = back.spoiled
        yield Found(f"the gradient of '{operator}' is NaN or infinite", where)
