"""FX502: a Python loop over the samples of a batch."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from fxopt.findings import Finding, Precision
from passes.audit.evidence import Evidence, code
from passes.audit.rule import Rule


def _over_batch(node: ast.expr, arguments: set[str]) -> bool:
    """`range` over the first dimension of an argument of the forward."""
    text = ast.unparse(node)
    return any(text in (f"range(len({n}))", f"range({n}.shape[0])", f"range({n}.size(0))") for n in arguments)


class SampleLoop(Rule):
    """A Python loop over the samples of a batch.

    It costs a kernel a sample, and an exported graph holds the batch size of the example.

    Bad:
        torch.stack([self.fc(x[i]) for i in range(x.shape[0])])

    Good:
        self.fc(x)

    Fix: compute the batch at once, or use `torch.vmap`.
    """

    id = "FX502"
    name = "sample-loop"
    group = "deployment"
    precision = Precision.MEDIUM

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        for body in evidence.bodies:
            arguments = {item.arg for item in body.arguments} if body.node.name == "forward" else set()
            for node in ast.walk(body.node):
                if isinstance(node, (ast.For, ast.comprehension)) and _over_batch(node.iter, arguments):
                    message = f"'{ast.unparse(node.iter)}' goes over the samples one by one"
                    yield self.found(message, code.at(body.path, node.iter), body.module)
