"""Zero points of weights, which are all zero: a model without them is the same, and OpenVINO sees through it."""

from __future__ import annotations

from typing import Any

_SHAPES_ONLY = frozenset({"Convert", "Reshape", "Unsqueeze"})


def drop_zero_points(model: Any) -> None:
    """Take out each subtraction of integers that are all zero.

    ONNX's DequantizeLinear writes one even for symmetric weights, and an exporter keeps equal constants once. Where a
    convolution and linear layers share theirs, OpenVINO no longer takes the layers for quantised: a vision transformer
    with patches of as many channels as its tokens ran half of its linear layers in floats.
    """
    for operator in model.get_ops():
        if operator.get_type_name() != "Subtract" or not _are_zeros(operator.input_value(1).get_node()):
            continue
        value, result = operator.input_value(0), operator.output(0)
        if value.get_partial_shape() == result.get_partial_shape():
            result.replace(value)


def _are_zeros(node: Any) -> bool:
    while node.get_type_name() in _SHAPES_ONLY:
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant" and node.get_element_type().is_integral() and not node.data.any()
