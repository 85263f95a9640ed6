"""FX408: gradients that vanish or explode."""

from __future__ import annotations

from collections.abc import Iterator

from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import place_of
from passes.audit.rule import Found, rule

# Shares of the largest norm: of stock models the first layer has 1e-4 and more, and a scaled branch some 1e-8; what
# comes before a softmax that is even at first has 1e-17 there.
_AT_FIRST, _ANYWHERE = 1e-7, 1e-20


@rule("FX408")
def gradient_range(evidence: Evidence) -> Iterator[Found]:
    """Gradients that vanish or explode.

    The first layers learn nothing, or the first step throws all weights away.

    Bad:
        for layer in self.layers:
            x = torch.sigmoid(layer(x))

    Good:
        for layer in self.layers:
            x = x + torch.relu(layer(x))

    Fix: add residual connections or norms, use another activation, or scale the initial weights.
    """
    # The gradient of a bias can be zero but for rounding, as that of attention's keys always is.
    every = evidence.backward.norms.items()
    norms = {name: norm for name, norm in every if norm and evidence.parameters[name].dim() > 1}
    if len(norms) < 2:
        return
    ordered = sorted((norm, name) for name, norm in norms.items())
    (least, smallest), (most, largest) = ordered[0], ordered[-1]
    # Branches that are scaled down on purpose have small gradients; the layer that runs first has none of these.
    first = next((f"{path}.weight" for path in evidence.order if f"{path}.weight" in norms), smallest)
    vanishing = norms[first] < _AT_FIRST * most
    worst = first if vanishing else smallest if least < _ANYWHERE * most else None
    if worst is None and 1e6 < most < float("inf"):
        worst = largest
    if worst is not None:
        path, _, leaf = worst.rpartition(".")
        how = "explodes" if worst == largest else "vanishes"
        message = f"the gradient of '{worst}' {how}: its norm is {norms[worst]:.1e}, the largest {most:.1e}"
        yield Found(message, place_of(evidence, path, leaf), path)
