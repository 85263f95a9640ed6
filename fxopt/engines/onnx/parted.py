"""An ONNX model in which operators share neither weights nor zero points.

With `session.x64quantprecision`, onnxruntime 1.31 makes each weight and its zero point unsigned, and fails at one that
it has made so for another operator.
"""

from __future__ import annotations

from typing import Any

from fxopt.engines.onnx.weights import constant_like, holds_integers


def part_weights(model: Any) -> None:
    """Give each operator that reads the integers of a weight a copy of them.

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


def part_zero_points(model: Any) -> None:
    """Give each weight that is held as integers a zero point of its own: torch's exporter holds equal ones once.

    Args:
        model: of `onnx_ir`; changed in place.
    """
    seen = set()
    for node in model.graph:
        if holds_integers(model, node) and len(node.inputs) > 2:
            zero = node.inputs[2]
            if zero in seen:
                node.replace_input_with(2, constant_like(model, zero, zero.const_value.numpy()))
            seen.add(zero)
