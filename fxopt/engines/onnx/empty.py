"""Assignments to empty slices in an ONNX model, which change nothing."""

from __future__ import annotations

from typing import Any


def drop_empty_assignments(model: Any) -> None:
    """Take out each ScatterND that writes into no values: OpenVINO refuses to read them.

    A window that is not shifted along one axis assigns its mask so, in a Swin transformer for one.

    Args:
        model: of `onnx_ir`; changed in place.
    """
    for node in list(model.graph):
        if node.op_type != "ScatterND" or node.outputs[0].is_graph_output():
            continue
        data, indices, updates = node.inputs
        if any(value.shape is not None and 0 in value.shape for value in (data, indices, updates)):
            node.outputs[0].replace_all_uses_with(data)
            model.graph.remove(node)
