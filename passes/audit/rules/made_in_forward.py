"""FX104: a parameter, or a module with parameters, made in `forward`."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from torch import nn

from fxopt.findings import Severity
from passes.audit.evidence import Evidence, code
from passes.audit.rule import Found, rule

_WITHOUT = tuple(
    f"torch.nn.modules.{name}"
    for name in "activation dropout loss pooling padding flatten upsampling pixelshuffle fold distance".split()
)
_WITH = (nn.PReLU, nn.MultiheadAttention)


@rule("FX104", Severity.ERROR)
def made_in_forward(evidence: Evidence) -> Iterator[Found]:
    """A parameter, or a module with parameters, made in `forward`.

    It is new in each call, or unknown to the optimizer that was made before.

    Bad:
        def forward(self, x):
            return nn.Linear(4, 4)(x)

    Good:
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

    Fix: make it in `__init__`.
    """
    for body in evidence.bodies:
        for call in body.calls():
            kind = body.resolve(call.func)
            if not isinstance(kind, type) or not issubclass(kind, (nn.Module, nn.Parameter)):
                continue
            if issubclass(kind, nn.Module) and kind.__module__.startswith(_WITHOUT) and kind not in _WITH:
                continue
            # It ran, and all its parameters are those of the model, if it has any.
            if evidence.forward.foreign.get(kind) is False:
                continue
            message = f"'{ast.unparse(call.func)}' is made while '{body.kind.__name__}.{body.node.name}' runs"
            yield Found(message, code.at(body.path, call), body.module)
