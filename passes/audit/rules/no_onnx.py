"""FX503: an operator without an ONNX form."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Finding
from passes.audit.evidence import Evidence
from passes.audit.evidence.onnx import lacks_onnx
from passes.audit.rule import Rule


class NoOnnx(Rule):
    """An operator without an ONNX form.

    The export to ONNX fails at it.

    Bad:
        torch.linalg.svd(x)

    Good:
        x @ x.mT  # or compute it outside the model

    Fix: replace the operator, or keep it out of the exported part.
    """

    id = "FX503"
    name = "no-onnx"
    group = "deployment"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        for operator, (place, path) in evidence.forward.operators.items() if evidence.forward else []:
            if lacks_onnx(operator):
                yield self.found(f"ONNX has no form of '{operator.name()}'", place, path)
