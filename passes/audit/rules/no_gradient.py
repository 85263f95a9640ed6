"""FX406: a parameter that is used and gets no gradient."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from fxopt.findings import Place
from passes.audit.evidence import Evidence, code
from passes.audit.evidence.trail import where, wholes
from passes.audit.rule import Found, rule


def _cuts(evidence: Evidence, path: str) -> Iterator[Place]:
    """Where the text of a forward around the parameter cuts gradients."""
    around = {path, *(name for name, _ in evidence.owner(path))}
    for body in evidence.bodies:
        for node in code.parts(ast.Attribute, body.node) if body.module in around else ():
            if node.attr in ("detach", "data", "no_grad", "inference_mode"):
                yield code.at(body.path, node, "the gradient may end here")


@rule("FX406")
def no_gradient(evidence: Evidence) -> Iterator[Found]:
    """A parameter that is used and gets no gradient.

    Something between it and the output cuts the gradient: `detach`, `data`, `no_grad`, an integer.

    Bad:
        h = self.body(x).detach()

    Good:
        h = self.body(x)

    Fix: keep the gradient, or freeze the parameter by `requires_grad_(False)`.
    """
    back = evidence.backward
    cut = {name for name, norm in back.norms.items() if norm is None and name in back.used}
    for whole, name in wholes(cut, back.norms).items():
        own, path = where(evidence, whole, name)
        cuts = tuple(_cuts(evidence, path))
        place = cuts[0] if len(cuts) == 1 else own
        related = tuple(each for each in cuts if each is not place)
        yield Found(f"'{whole}' is used, but no gradient reaches it", place, path, related)
