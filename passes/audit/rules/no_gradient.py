"""FX406: a parameter that is used and gets no gradient."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from fxopt.findings import Finding, Place
from passes.audit.evidence import Evidence, code
from passes.audit.evidence.trail import place_of
from passes.audit.rule import Rule


def _cuts(evidence: Evidence, path: str) -> Iterator[Place]:
    """Where the text of a forward around the parameter cuts gradients."""
    around = {path, *(name for name, _ in evidence.owner(path))}
    for body in evidence.bodies:
        for node in ast.walk(body.node) if body.module in around else ():
            if isinstance(node, ast.Attribute) and node.attr in ("detach", "data", "no_grad", "inference_mode"):
                yield code.at(body.path, node, "the gradient may end here")


class NoGradient(Rule):
    """A parameter that is used and gets no gradient.

    Something between it and the output cuts the gradient: `detach`, `data`, `no_grad`, an integer.

    Bad:
        h = self.body(x).detach()

    Good:
        h = self.body(x)

    Fix: keep the gradient, or freeze the parameter by `requires_grad_(False)`.
    """

    id = "FX406"
    name = "no-gradient"
    group = "training"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        back, reported = evidence.backward, set()
        for name, norm in back.norms.items() if back else []:
            path, _, leaf = name.rpartition(".")
            if norm is None and back is not None and name in back.used and path not in reported:
                reported.add(path)
                cuts = tuple(_cuts(evidence, path))
                place = cuts[0] if len(cuts) == 1 else place_of(evidence, path, leaf)
                related = tuple(each for each in cuts if each is not place)
                yield self.found(f"'{name}' is used, but no gradient reaches it", place, path, related)
