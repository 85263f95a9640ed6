"""Biases in an ONNX model that integer kernels can hold."""

from __future__ import annotations

from typing import Any

from fxopt.engines.onnx.weights import constant_like, holds_integers

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_LARGEST = 2.0**30


def hold_biases(model: Any) -> None:
    """Let no bias of a convolution of integers overflow 32 bits.

    onnxruntime holds it in steps of weight times input. Where the weights of a channel are nothing beside its bias, as
    those that a norm all but switched off, these steps are made longer until it fits: each weight is then off by less
    than 2^-31 of the bias for each step of the input.

    Args:
        model: of `onnx_ir`; changed in place.
    """
    import numpy as np

    constants = model.graph.initializers
    for node in list(model.graph):
        if node.op_type not in _CONVOLUTIONS or len(node.inputs) < 3:
            continue
        value, weight = (source.producer() for source in node.inputs[:2])
        known = node.inputs[2].name in constants and holds_integers(model, weight)
        if not known or value is None or value.op_type != "DequantizeLinear" or value.inputs[1].name not in constants:
            continue
        bias, step = (each.const_value.numpy() for each in (node.inputs[2], value.inputs[1]))
        stored, scale = (each.const_value.numpy() for each in weight.inputs[:2])
        least = np.abs(bias) / (step * _LARGEST)
        if scale.size == 1:
            least = least.max().reshape(scale.shape)
        if least.shape != scale.shape or bool((least <= scale).all()):  # groups that share scales stay floats
            continue
        longer = np.maximum(scale, least).astype(scale.dtype)
        shape = [1] * stored.ndim
        if scale.ndim:
            shape[weight.attributes.get_int("axis", 1)] = -1
        places = np.rint(stored * (scale / longer).reshape(shape)).astype(stored.dtype)
        weight.replace_input_with(0, constant_like(model, weight.inputs[0], places))
        weight.replace_input_with(1, constant_like(model, weight.inputs[1], longer))
