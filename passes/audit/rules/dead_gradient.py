"""FX407: a weight whose gradient is exactly zero."""

from __future__ import annotations

from collections.abc import Iterator

from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import place_of
from passes.audit.rule import Found, rule


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
