"""FX412: a signal that explodes, or shrinks to nothing, on its way through the layers."""

from __future__ import annotations

from collections.abc import Iterator

from passes.audit.evidence import Evidence
from passes.audit.evidence.spread import Spread
from passes.audit.evidence.trail import place_of
from passes.audit.rule import Found, rule

# A float32 tells numbers apart that differ by 1e-7 of themselves: this is three digits above.
_ALIKE = 1e-4**2
_EXPLODED = 1e6


def _alike(found: Spread) -> bool:
    """Whether samples hardly differ, beside what they have in common."""
    return found.between < _ALIKE * (found.variance + found.mean**2)


@rule("FX412")
def signal_lost(evidence: Evidence) -> Iterator[Found]:
    """A signal that explodes, or shrinks to nothing, on its way through the layers.

    Where outputs are the same for every sample, up to rounding, nothing of the input is left to learn from; where
    they are huge, so are the first gradients.

    Bad:
        for layer in self.layers:  # 20 of them, as torch initialises them
            x = torch.relu(layer(x))

    Good:
        for layer, norm in zip(self.layers, self.norms):
            x = x + torch.relu(layer(norm(x)))

    Fix: initialise for the activation at hand, or add norms or residual connections.
    """
    seen = evidence.forward
    if seen.given is None or not evidence.settled:
        return
    # A sum of parts is no layer: what it was made of comes before it.
    leaves = [(path, found) for path, found in seen.layers.items() if not any(evidence.children(path))]
    if seen.given.largest < 1e-3 * _EXPLODED:
        path = next((path for path, found in leaves if _EXPLODED < found.largest < float("inf")), None)
        if path is not None:
            reach = f"{seen.layers[path].largest:.1e}, of an input up to {seen.given.largest:.1e}"
            yield Found(f"the output of '{path}' reaches {reach}", place_of(evidence, path, ""), path)
    if seen.results and all(map(_alike, seen.results)) and not _alike(seen.given):
        first = len(leaves)
        while first and _alike(leaves[first - 1][1]):
            first -= 1
        path, found = leaves[first] if first < len(leaves) else ("", seen.results[0])
        # A last layer that starts as zeros gives the same for all samples at once, and is meant to.
        if found.between > 0:
            share = (found.between / (found.variance + found.mean**2)) ** 0.5
            message = f"outputs of '{path or 'the model'}' differ between samples by {share:.0e} of their size"
            yield Found(f"{message}, and all behind by as little", place_of(evidence, path, ""), path)
