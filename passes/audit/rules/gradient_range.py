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
        norms = evidence.backward.norms if evidence.backward else {}
        # The gradient of a bias can be zero but for rounding, as that of attention's keys always is.
        shapes = dict(evidence.subject.module.named_parameters()) if evidence.subject.module is not None else {}
        norms = {name: norm for name, norm in norms.items() if norm and shapes[name].dim() > 1}
        if len(norms) < 2:
            return
        ordered = sorted((norm, name) for name, norm in norms.items() if norm)
        (least, smallest), (most, largest) = ordered[0], ordered[-1]
        ratio = least / most
        worst = smallest if ratio < 1e-12 else largest if 1e6 < most < float("inf") else None
        if worst is not None:
            path, _, leaf = worst.rpartition(".")
            how, value = ("vanishes", least) if worst == smallest else ("explodes", most)
            message = f"the gradient of '{worst}' {how}: its norm is {value:.1e}, the largest {most:.1e}"
            yield self.found(message, place_of(evidence, path, leaf), path)
