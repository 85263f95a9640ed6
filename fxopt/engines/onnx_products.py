"""Matrix products of integers in an ONNX model, as runtimes have integer kernels for them."""

from __future__ import annotations

from typing import Any

from fxopt.engines.onnx_weights import constant_like, holds_integers


def part_sums(model: Any) -> None:
    """Write Gemm of integers as MatMul and Add.

    What onnxruntime has for Gemm takes a sum of integers alone, so that one with a float bias runs in floats.

    Args:
        model: of `onnx_ir`; changed in place.
    """
    import onnx_ir as ir

    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    for node in list(model.graph):
        if node.op_type != "Gemm" or len(node.inputs) < 3:
            continue
        *factors, bias = node.inputs
        quantised = all(value.producer() and value.producer().op_type == "DequantizeLinear" for value in factors)
        if not quantised or any(each.value != plain[name] for name, each in node.attributes.items()):
            continue
        product = ir.node("MatMul", factors)
        total = ir.node("Add", [product.outputs[0], bias])
        for made in (product, total):
            made.outputs[0].type, made.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        ir.convenience.replace_nodes_and_values(
            model.graph, node, [node], [product, total], node.outputs, total.outputs
        )


def transpose_weights(model: Any) -> None:
    """Hold the integers of a weight as the product reads them, where nothing else reads them.

    onnxruntime folds a Transpose behind a weight only where one product reads it; where several do, as calls of one
    layer, or layers with equal weights, it fuses the Transpose into each, and these run in floats.

    Args:
        model: of `onnx_ir`; changed in place.
    """
    for node in list(model.graph):
        weight: Any = node.inputs[0].producer() if node.op_type == "Transpose" else None
        if not holds_integers(model, weight) or len(weight.inputs[0].uses()) > 1 or len(weight.outputs[0].uses()) > 1:
            continue
        stored, places = weight.inputs[0], weight.inputs[0].const_value.numpy()
        order = list(node.attributes.get_ints("perm", list(range(places.ndim))[::-1]))
        weight.replace_input_with(0, constant_like(model, stored, places.transpose(order).copy()))
        weight.outputs[0].shape = node.outputs[0].shape
        if "axis" in weight.attributes:
            weight.attributes.add(_axis(order.index(weight.attributes.get_int("axis"))))
        node.outputs[0].replace_all_uses_with(weight.outputs[0], replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def _axis(axis: int) -> Any:
    import onnx_ir as ir

    return ir.AttrInt64("axis", axis)
