"""FX505: a buffer that is not saved, and can't be made again."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from passes.audit.evidence import Evidence, code
from passes.audit.rule import Found, rule

_RANDOM = ("torch.rand", "torch.normal", "torch.bernoulli", ".normal_(", ".uniform_(", ".bernoulli_(")


@rule("FX505")
def unsaved_buffer(evidence: Evidence) -> Iterator[Found]:
    """A buffer that is not saved, and can't be made again.

    It is not part of `state_dict()`; after loading it holds other random numbers, or has lost what was learned.

    Bad:
        self.register_buffer("noise", torch.randn(4), persistent=False)

    Good:
        self.register_buffer("noise", torch.randn(4))

    Fix: save it: leave `persistent=False` out.
    """
    written = evidence.backward.written
    for path, module in evidence.users:
        for name in sorted(module._non_persistent_buffers_set):
            for file, statement in code.assignments(type(module), name):
                full = f"{path}.{name}".lstrip(".")
                text = ast.unparse(statement)
                if "persistent" in text and (full in written or any(word in text for word in _RANDOM)):
                    why = "the forward changes it" if full in written else "it is random"
                    yield Found(f"'{full}' is not saved, though {why}", code.at(file, statement), path)
