"""FX503: an operator without an ONNX form."""

from __future__ import annotations

from collections.abc import Iterator

from passes.audit.evidence import Evidence
from passes.audit.evidence.onnx import lacks_onnx
from passes.audit.rule import Found, rule


@rule("FX503")
def no_onnx(evidence: Evidence) -> Iterator[Found]:
    """An operator without an ONNX form.

    The export to ONNX fails at it.

    Bad:
        torch.linalg.svd(x)

    Good:
        x @ x.mT  # or compute it outside the model

    Fix: replace the operator, or keep it out of the exported part.
    """
    for operator, (place, path) in evidence.forward.operators.items():
        if lacks_onnx(operator):
            yield Found(f"ONNX has no form of '{operator.name()}'", place, path)
