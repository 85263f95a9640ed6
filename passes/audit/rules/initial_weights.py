"""FX402 and FX403: weights that start as zeros, all equal, or in a scale that doesn't fit."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from fxopt.findings import Precision
from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import init_place, place_of
from passes.audit.rule import Found, rule

_ELEMENTWISE = (nn.LayerNorm, nn.RMSNorm)


def _scales(module: nn.Module, weight: torch.Tensor) -> bool:
    """Whether each number of a weight scales a channel of its own: it has no units that could stay equal."""
    own = not type(module).__module__.startswith("torch.nn.")
    return isinstance(module, _ELEMENTWISE) or (own and sum(size > 1 for size in weight.shape) < 2)


def _all_equal(weight: torch.Tensor) -> bool:
    corner = weight[:2].flatten()[:64]  # tells most weights without a look at the rest
    return bool((corner == corner[0]).all()) and bool((weight == corner[0]).all())


@rule("FX402")
def dead_weights(evidence: Evidence) -> Iterator[Found]:
    """Weights that start as zeros, or all equal, and can't learn.

    Units that start equal stay equal; a layer of zeros before an activation has no gradient at all.

    Bad:
        nn.init.zeros_(self.fc1.weight)

    Good:
        nn.init.kaiming_normal_(self.fc1.weight)

    Fix: initialise with random numbers.
    """
    norms = evidence.backward.norms
    for path, module in evidence.modules:
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() < 2 or not weight.requires_grad or weight.is_meta:
            continue
        if weight.shape[0] < 2 or _scales(module, weight) or not _all_equal(weight.detach()):
            continue
        first = float(weight.detach().flatten()[0])
        zero = first == 0
        if not zero or norms.get(f"{path}.weight".lstrip(".")) == 0:
            what = "all zeros, and so is its gradient" if zero else f"{first:g} everywhere"
            place = init_place(evidence, path) or place_of(evidence, path, "weight")
            yield Found(f"the weight of '{path}' is {what}", place, path)


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
