"""FX302, FX303, FX304: a root, a logarithm or a reciprocal of what can be zero."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import divisor, source
from passes.audit.rule import Found, rule


@rule("FX302", once_a_line=True)
def unguarded_sqrt(evidence: Evidence) -> Iterator[Found]:
    """A square root of what can be zero.

    Its gradient is infinite at zero, and its reciprocal is too.

    Bad:
        x.var(-1).sqrt()

    Good:
        (x.var(-1) + 1e-5).sqrt()

    Fix: add an epsilon before the root.
    """
    return _of_zero(evidence, {"sqrt", "rsqrt", "sqrt_"}, "the root of '{}' has an infinite gradient at 0")


@rule("FX303", once_a_line=True)
def unguarded_log(evidence: Evidence) -> Iterator[Found]:
    """A logarithm of what can be zero.

    It is minus infinity at zero; a softmax or sigmoid underflows to zero in float16.

    Bad:
        torch.softmax(x, -1).log()

    Good:
        torch.log_softmax(x, -1)

    Fix: use the function that fuses both (`log_softmax`, `logsigmoid`), or clamp first.
    """
    return _of_zero(evidence, {"log", "log2", "log10"}, "the logarithm of '{}' is -inf where that is 0")


@rule("FX304", once_a_line=True)
def unguarded_division(evidence: Evidence) -> Iterator[Found]:
    """A division by what can be zero.

    One row of zeros gives NaN, which spreads to the whole batch in the next norm.

    Bad:
        x / x.norm(dim=-1, keepdim=True)

    Good:
        x / (x.norm(dim=-1, keepdim=True) + 1e-5)

    Fix: add an epsilon, or clamp from below.
    """
    names = {"div", "div_", "true_divide", "__rdiv__", "__rtruediv__", "reciprocal"}
    return _of_zero(evidence, names, "'{}' is divided by, and can be 0")


def _of_zero(evidence: Evidence, names: Collection[str], message: str) -> Iterator[Found]:
    for step, made in evidence.forward.made():
        operand = divisor(step) if step.name in names else None
        maker = source(operand, made, step.name) if operand is not None else ""
        if maker and step.place is not None:
            yield Found(message.format(maker), step.place, step.module)
