"""FX305: a result that float16 or bfloat16 can't hold."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Severity
from passes.audit.evidence import Evidence
from passes.audit.evidence.precision import Loss
from passes.audit.rule import Found, rule

_ADVICE = {
    "overflow": "scale before it, or compute this part in float32: cast its input by `.float()`",
    "underflow": "scale up before it, or compute this part in float32: cast its input by `.float()`",
    "error": "subtract or normalise before the numbers grow large, or compute this part in float32",
}


def _message(loss: Loss) -> str:
    name, slip = str(loss.dtype).removeprefix("torch."), loss.slip
    if slip.kind != "error":
        what = "infinite" if slip.kind == "overflow" else "all zeros"
        return f"'{loss.operator}' gives {slip.value:.1e}: {slip.kind} in {name}, where it is {what}"
    tail = ", and so are the outputs" if loss.reaches else ""
    return (
        f"the result of '{loss.operator}' is off by {slip.value:.0%} in {name}, "
        f"of operands that are off by {slip.given:.1%}{tail}"
    )


@rule("FX305")
def low_precision(evidence: Evidence) -> Iterator[Found]:
    """A result that float16 or bfloat16 can't hold.

    Under autocast, or after `half()`, it becomes infinite or zero, or is lost in the rounding of larger numbers.

    Bad:
        (x * 1000).pow(2).sum(-1)

    Good:
        x.pow(2).sum(-1)

    Fix: scale before, or compute this part in float32.
    """
    reported = set()
    for loss in evidence.half:
        # Before batch norms have seen a batch, signals are of a size that they never have again.
        if loss.place in reported or not (evidence.settled or loss.slip.kind == "overflow"):
            continue
        reported.add(loss.place)
        serious = loss.slip.kind == "overflow" or (loss.slip.kind == "error" and loss.reaches)
        severity = Severity.WARNING if serious else Severity.NOTE
        advice = _ADVICE[loss.slip.kind]
        yield Found(_message(loss), loss.place, loss.module, severity=severity, advice=advice)
