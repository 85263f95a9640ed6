"""An ONNX model in which each operator has weights of its own."""

from __future__ import annotations

from typing import Any

from fxopt.engines.onnx.weights import constant_like, holds_integers


def part_weights(model: Any) -> None:
    """Give each operator that reads the integers of a weight a copy of them.

    With `session.x64quantprecision`, onnxruntime 1.31 makes each weight unsigned, and fails at one that it has made so
    for another operator.

    Args:
        model: of `onnx_ir`; changed in place.
    """
    import onnx_ir as ir

    for node in list(model.graph):
        if not holds_integers(model, node):
            continue
        _, *others = node.outputs[0].uses()
        stored, scale, *zero = node.inputs
        for reader, index in others:
            own = [constant_like(model, each, each.const_value.numpy()) for each in (stored, *zero)]
            copy = ir.node("DequantizeLinear", [own[0], scale, *own[1:]], node.attributes)
            model.graph.insert_before(reader, copy)
            reader.replace_input_with(index, copy.outputs[0])
