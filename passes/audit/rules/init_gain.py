"""FX403: weights whose scale doesn't fit the activation behind them."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Precision
from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import init_place, place_of
from passes.audit.rule import Found, rule

_TOO_LARGE, _TOO_SMALL = 4.0, 0.1


@rule("FX403", precision=Precision.MEDIUM)
def init_gain(evidence: Evidence) -> Iterator[Found]:
    """Weights whose scale doesn't fit the activation behind them.

    Too large a gain saturates or explodes within some layers; too small a one loses the signal, where neither a
    norm nor a residual connection brings it back.

    Bad:
        nn.init.normal_(self.fc.weight, std=1.0)

    Good:
        nn.init.kaiming_normal_(self.fc.weight, nonlinearity="relu")

    Fix: initialise by `kaiming_normal_` for ReLU, `xavier_normal_` for tanh and sigmoid.
    """
    for path, one in evidence.gains.items():
        ratio = one.gain / one.wanted
        # A layer of zeros is a matter of its own.
        small = 0 < ratio < _TOO_SMALL and not one.corrected
        # One that keeps gradients in scale, as `mode="fan_out"` does, is meant.
        large = min(ratio, one.backward / one.wanted) > _TOO_LARGE
        if one.activation and (small or large):
            place = init_place(evidence, path) or place_of(evidence, path, "weight")
            wants = f"'{one.activation.strip('_')}' behind it wants {one.wanted:.1f}"
            yield Found(f"the gain of '{path}' is {one.gain:.2g}; {wants}", place, path)
