"""FX408: gradients that vanish or explode."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Finding
from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import place_of
from passes.audit.rule import Rule


class GradientRange(Rule):
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

    id = "FX408"
    name = "gradient-range"
    group = "training"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        norms = {name: norm for name, norm in evidence.backward.norms.items() if norm} if evidence.backward else {}
        if len(norms) < 2:
            return
        smallest, largest = min(norms, key=lambda n: norms[n]), max(norms, key=lambda n: norms[n])
        ratio = norms[smallest] / norms[largest]
        worst = smallest if ratio < 1e-12 else largest if 1e6 < norms[largest] < float("inf") else None
        if worst is not None:
            path, _, leaf = worst.rpartition(".")
            how = "vanishes" if worst == smallest else "explodes"
            message = (
                f"the gradient of '{worst}' {how}: its norm is {norms[worst]:.1e}, the largest is {norms[largest]:.1e}"
            )
            yield self.found(message, place_of(evidence, path, leaf), path)
