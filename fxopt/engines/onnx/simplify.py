"""The ONNX model that torch's exporter gives, without what it computes at each call and need not."""

from __future__ import annotations

from typing import Any


def simplify(model: Any) -> None:
    """Fold what does not depend on inputs, and share what is computed twice.

    In place of the exporter's own `optimize`: of the 46 rules that this tries at each node, one visits all nodes each
    time, which takes a third of the export of a Swin transformer. Runtimes fuse and drop operators themselves; only
    shapes of a free batch size are better written as -1 before.

    Args:
        model: of `onnx_ir`; changed in place.
    """
    from onnx_ir.passes import common
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules.common import materialize_reshape_shape_rule

    optimizer.inline(model)
    optimizer.fold_constants(model, onnx_shape_inference=True)
    rewriter.rewrite(model, [materialize_reshape_shape_rule])
    for one in (
        common.RemoveUnusedNodesPass(),
        # Constants are nodes by now. As initializers, equal ones are held once, and lie in the file of weights.
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        # An output may be an input or another output by now.
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        one(model)
