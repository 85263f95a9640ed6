"""An ONNX model in which each operator has weights of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fxopt.engines.onnx_weights import constant_like, holds_integers


def part_weights(path: Path, parted: Path) -> None:
    """Write the model at `path` to `parted`, with a copy of a weight's integers for each operator that reads them.

    With `session.x64quantprecision`, onnxruntime 1.31 makes each weight unsigned, and fails at one that it has made so
    for another operator.
    """
    import onnx_ir as ir

    model: Any = ir.load(path)
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
    ir.save(model, parted, external_data=f"{parted.name}.data")
