"""FX401: a parameter that no forward uses."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Finding
from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import where, wholes
from passes.audit.rule import Rule


class UnusedParameter(Rule):
    """A parameter that no forward uses.

    It is never trained; DistributedDataParallel fails on it.

    Bad:
        self.spare = nn.Linear(8, 8)  # never called

    Good:
        # removed

    Fix: remove it, or use it.
    """

    id = "FX401"
    name = "unused-parameter"
    group = "training"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        back = evidence.backward
        norms = back.norms if back is not None else {}
        unused = {name for name, norm in norms.items() if norm is None and back is not None and name not in back.used}
        for whole, name in wholes(unused, norms).items():
            yield self.found(f"'{whole}' takes no part in the forward", *where(evidence, whole, name))
