"""Weights that an ONNX model holds as integers."""

from __future__ import annotations

from typing import Any


def holds_integers(model: Any, node: Any) -> bool:
    """Whether `node` gives the values of a weight's integers: it dequantises a constant.

    Args:
        model: of `onnx_ir`.
        node: of its graph, or None.
    """
    if node is None or node.op_type != "DequantizeLinear":
        return False
    return all(value is not None and value.name in model.graph.initializers for value in node.inputs)


def constant_like(model: Any, like: Any, values: Any) -> Any:
    """A new constant of the graph with these values.

    Args:
        model: of `onnx_ir`; changed in place.
        like: the constant that it is named after.
        values: an array of NumPy.
    """
    import onnx_ir as ir

    known = model.graph.initializers
    name = next(name for count in range(1, len(known) + 2) if (name := f"{like.name}.{count}") not in known)
    held = ir.tensor(values)
    made = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(held.dtype), const_value=held)
    model.graph.register_initializer(made)
    return made
