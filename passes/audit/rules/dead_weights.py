"""FX402: weights that start as zeros, or all equal, and can't learn."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

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
