"""FX503: an operator without an ONNX form."""

from __future__ import annotations

from collections.abc import Iterator

from fxopt.findings import Finding
from passes.audit.evidence import Evidence
from passes.audit.rule import Rule

_WITHOUT = frozenset(
    "_linalg_svd _linalg_eigh linalg_eig linalg_qr linalg_cholesky_ex linalg_inv_ex linalg_lu_factor_ex "
    "linalg_lstsq _linalg_solve_ex geqrf histc bincount kthvalue mode poisson lgamma digamma igamma igammac "
    "linalg_matrix_exp polygamma cummax cummin".split()
)


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
        for name, (place, path) in evidence.forward.operators.items() if evidence.forward else []:
            if name.removeprefix("aten::") in _WITHOUT:
                yield self.found(f"ONNX has no form of '{name}'", place, path)
