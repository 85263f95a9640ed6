"""Zero points in an ONNX model: each weight has its own."""

from __future__ import annotations

from typing import Any


def part_zero_points(model: Any) -> None:
    """Give each weight that is held as integers a zero point of its own.

    torch's exporter holds equal ones once. With `session.x64quantprecision`, onnxruntime 1.31 makes each weight and
    its zero point unsigned, and fails at a zero point that it has made so for another weight.

    Args:
        model: of `onnx_ir`; changed in place.
    """
    import onnx_ir as ir

    graph, seen = model.graph, set()
    for node in graph:
        if node.op_type != "DequantizeLinear" or len(node.inputs) < 3:
            continue
        stored, _, zero = node.inputs
        if stored.name not in graph.initializers or zero.name not in graph.initializers:
            continue
        if zero.name in seen:
            own = ir.Value(name=f"{stored.name}.zero_point", shape=zero.shape, type=zero.type)
            own.const_value = zero.const_value
            graph.register_initializer(own)
            node.replace_input_with(2, own)
        seen.add(zero.name)
