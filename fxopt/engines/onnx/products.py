"""Matrix products of integers in an ONNX model, as runtimes have integer kernels for them."""

from __future__ import annotations

from typing import Any

from fxopt.engines.onnx.weights import constant_like, holds_integers

_DEQUANTISE = "DequantizeLinear"


def part_sums(model: Any) -> None:
    """Write Gemm of integers as MatMul and Add.

    What onnxruntime has for Gemm gives integers, and takes a bias of integers: one whose output nobody quantises runs
    in floats, and in front of a quantiser the rounded bias moves values to the next step.

    Args:
        model: of `onnx_ir`; changed in place.
    """
    import onnx_ir as ir

    plain = {"alpha": 1.0, "beta": 1.0, "transA": 0}
    for node in list(model.graph):
        if node.op_type != "Gemm" or len(node.inputs) < 3:
            continue
        given, factor, bias = node.inputs
        weight: Any = factor.producer()
        quantised = all(each is not None and each.op_type == _DEQUANTISE for each in (given.producer(), weight))
        attributes = {name: each.value for name, each in node.attributes.items()}
        if not quantised or any(attributes.get(name, value) != value for name, value in plain.items()):
            continue
        made = []
        if attributes.get("transB", 0):
            if not holds_integers(model, weight):
                continue
            weight = ir.node(_DEQUANTISE, weight.inputs, dict(weight.attributes))
            _transpose(model, weight, [1, 0])
            weight.outputs[0].type = factor.type
            made.append(weight)
        product = ir.node("MatMul", [given, weight.outputs[0]])
        total = ir.node("Add", [product.outputs[0], bias])
        for each in (product, total):
            each.outputs[0].type, each.outputs[0].shape = node.outputs[0].type, node.outputs[0].shape
        made += [product, total]
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], made, node.outputs, total.outputs)


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
        axes = len(weight.inputs[0].shape)
        _transpose(model, weight, list(node.attributes.get_ints("perm", list(range(axes))[::-1])))
        node.outputs[0].replace_all_uses_with(weight.outputs[0], replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def _transpose(model: Any, weight: Any, order: list[int]) -> None:
    """Let what dequantises a constant do so with the axes in another order."""
    import onnx_ir as ir

    places = weight.inputs[0].const_value.numpy().transpose(order).copy()
    weight.replace_input_with(0, constant_like(model, weight.inputs[0], places))
    weight.outputs[0].shape = ir.Shape(places.shape)
    if "axis" in weight.attributes:
        weight.attributes.add(ir.AttrInt64("axis", order.index(weight.attributes.get_int("axis"))))
