"""FX401: a parameter that no forward uses."""

from __future__ import annotations

from collections.abc import Iterator

from passes.audit.evidence import Evidence
from passes.audit.evidence.trail import where, wholes
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
