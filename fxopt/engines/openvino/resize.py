"""Resizes in a form in which OpenVINO keeps what they are marked with.

Interpolate of opset 11, which files in ONNX are read as   =>   the same of opset 4

The first is replaced by the second while a model is compiled, and a mark on it is lost then. See OpenVINO's
`ConvertInterpolate11ToInterpolate4`.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def keep_marks(model: Any) -> None:
    """Rewrite all resizes of a model to opset 4; those of unknown rank stay as they are."""
    for operator in model.get_ordered_ops():
        info = operator.get_type_info()
        if (info.name, info.version_id) == ("Interpolate", "opset11"):
            _rewrite(operator)


def _rewrite(resize: Any) -> None:
    from openvino import opset13
    from openvino.utils.node_factory import NodeFactory

    image, given, *axes = [resize.input_value(index) for index in range(resize.get_input_size())]
    dimensions = given.get_partial_shape()[0]
    if dimensions.is_dynamic:
        return
    attributes = resize.get_attributes()
    # Opset 4 takes sizes and scales, of which it reads one.
    if attributes["shape_calculation_mode"] == "sizes":
        sizes, scales = given, opset13.constant(np.ones(dimensions.get_length(), np.float32)).output(0)
    else:
        sizes, scales = opset13.constant(np.ones(dimensions.get_length(), np.int64)).output(0), given
    rewritten = NodeFactory("opset4").create("Interpolate", [image, sizes, scales, *axes], attributes)
    rewritten.set_friendly_name(resize.get_friendly_name())
    for reader in resize.output(0).get_target_inputs():
        reader.replace_source_output(rewritten.output(0))
