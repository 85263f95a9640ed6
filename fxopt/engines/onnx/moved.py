"""Operators of an ONNX model that only move values: on integers where what they read is made of some.

Runtimes look for what dequantises right before a convolution or a product.
"""

from __future__ import annotations

from typing import Any

from fxopt.engines.onnx.weights import constant_like, holds_integers

_REPEATS = ("reflect", "edge", "wrap")


def pad_integers(model: Any) -> None:
    """Let a Pad that repeats values of its input repeat their integers.

    Args:
        model: of `onnx_ir`; changed in place.
    """
    import onnx_ir as ir

    for node in list(model.graph):
        source: Any = node.inputs[0].producer() if node.op_type == "Pad" else None
        repeats = source is not None and node.attributes.get_string("mode", "constant") in _REPEATS
        if not repeats or source.op_type != "DequantizeLinear" or source.inputs[1].shape.rank() > 0:
            continue
        stored, *scale = source.inputs
        where = [None if index == 2 else each for index, each in enumerate(node.inputs)]  # there it takes a float
        pad = ir.node("Pad", [stored, *where[1:]], node.attributes)
        pad.outputs[0].type, pad.outputs[0].shape = stored.type, node.outputs[0].shape
        values = _dequantised([pad.outputs[0], *scale], source, node.outputs[0])
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], [pad, values], node.outputs, values.outputs)


def split_weights(model: Any) -> None:
    """Hold the parts of a weight by themselves, where the weight is split, as attention to another sequence does.

    Args:
        model: of `onnx_ir`; changed in place.
    """
    import numpy as np
    import onnx_ir as ir

    for node in list(model.graph):
        weight: Any = node.inputs[0].producer() if node.op_type == "Split" else None
        if not holds_integers(model, weight):
            continue
        axis = node.attributes.get_int("axis", 0)
        ends = np.cumsum([output.shape[axis] for output in node.outputs])[:-1]
        by_part = weight.inputs[1].shape.rank() > 0 and weight.attributes.get_int("axis", 1) == axis
        parts: list[list[Any]] = [[] for _ in node.outputs]
        for held in weight.inputs:
            values = held.const_value.numpy()
            whole = held is not weight.inputs[0] and not by_part
            split = [values] * len(parts) if whole else np.split(values, ends, 0 if values.ndim == 1 else axis)
            for part, each in zip(parts, split, strict=True):
                part.append(constant_like(model, held, each.copy()))
        made = [_dequantised(part, weight, output) for part, output in zip(parts, node.outputs, strict=True)]
        outputs = [each.outputs[0] for each in made]
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], made, node.outputs, outputs)


def _dequantised(inputs: Any, like: Any, value: Any) -> Any:
    """What dequantises as `like` does, and gives what `value` was."""
    import onnx_ir as ir

    made = ir.node("DequantizeLinear", inputs, like.attributes)
    made.outputs[0].type, made.outputs[0].shape = value.type, value.shape
    return made
