"""FX505: a buffer that is not saved, and can't be made again."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from fxopt.findings import Finding
from passes.audit.evidence import Evidence, code
from passes.audit.rule import Rule

_RANDOM = ("torch.rand", "torch.normal", "torch.bernoulli", ".normal_(", ".uniform_(", ".bernoulli_(")


class UnsavedBuffer(Rule):
    """A buffer that is not saved, and can't be made again.

    It is not part of `state_dict()`; after loading it holds other random numbers, or has lost what was learned.

    Bad:
        self.register_buffer("noise", torch.randn(4), persistent=False)

    Good:
        self.register_buffer("noise", torch.randn(4))

    Fix: save it: leave `persistent=False` out.
    """

    id = "FX505"
    name = "unsaved-buffer"
    group = "deployment"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        written = evidence.backward.written if evidence.backward else set()
        for path, module in evidence.users:
            for name in sorted(module._non_persistent_buffers_set):
                for file, statement in code.assignments(type(module), name):
                    full = f"{path}.{name}".lstrip(".")
                    text = ast.unparse(statement)
                    if "persistent" in text and (full in written or any(word in text for word in _RANDOM)):
                        why = "the forward changes it" if full in written else "it is random"
                        yield self.found(f"'{full}' is not saved, though {why}", code.at(file, statement), path)
