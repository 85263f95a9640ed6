"""FX401, FX406, FX407 and FX408: which parameters take part in training, and what gradients they get."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from fxopt.findings import Place
from passes.audit.evidence import Evidence, code
from passes.audit.evidence.trail import place_of, where, wholes
from passes.audit.rule import Found, rule


@rule("FX401")
def unused_parameter(evidence: Evidence) -> Iterator[Found]:
    """A parameter that no forward uses.

    It is never trained; DistributedDataParallel fails on it.

    Bad:
        self.spare = nn.Linear(8, 8)  # never called

    Good:
        # removed

    Fix: remove it, or use it.
    """
    back = evidence.backward
    unused = {name for name, norm in back.norms.items() if norm is None and name not in back.used}
    for whole, name in wholes(unused, back.norms).items():
        yield Found(f"'{whole}' takes no part in the forward", *where(evidence, whole, name))


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


@rule("FX407")
def dead_gradient(evidence: Evidence) -> Iterator[Found]:
    """A weight whose gradient is exactly zero.

    It never changes: everything behind it is cut off or saturated.

    Bad:
        torch.relu(self.fc(x) - 100)

    Good:
        torch.relu(self.fc(x))

    Fix: look at the activation behind it.
    """
    reported = set()
    for name in sorted(evidence.backward.dead):
        path, _, leaf = name.rpartition(".")
        parameter = evidence.parameters[name]
        if parameter.dim() > 1 and bool((parameter != parameter.flatten()[0]).any()) and path not in reported:
            reported.add(path)
            yield Found(f"the gradient of '{name}' is exactly 0", place_of(evidence, path, leaf), path)


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
