"""Clamps that change nothing, by which an operator writes its output in the precision of what reads it.

The last of what OpenVINO fuses into an operator decides what it writes, and a clamp is fused. Without one a linear
layer in bfloat16 would round what a sum in float32 reads, and what crosses from one precision to the other would be
written twice.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fxopt.engines.openvino.mixed import readers, shifts_or_scales, with_affine


def write_float32(model: Any, kept: Collection[str]) -> set[str]:
    """Let linear layers in bfloat16 write float32 where an operator reads them that is kept in it.

    Not convolutions: in float32 these are slower when they take the sum behind them for a part of themselves.

    Args:
        model: as OpenVINO has read it; changed.
        kept: names of the operators that are kept.

    Returns:
        The names of the clamps, which are to be kept too.
    """
    clamps = set()
    for layer in model.get_ordered_ops():
        linear = layer.get_type_name() == "MatMul" and layer.input_value(1).get_node().get_type_name() == "Constant"
        read_by = [reader for reader in readers(layer) if reader.get_friendly_name() in kept]
        if linear and read_by and layer.get_friendly_name() not in kept:
            clamps.add(_clamp(read_by[0] if shifts_or_scales(read_by[0]) else layer))
    return clamps


def write_bfloat16(model: Any, kept: Collection[str]) -> None:
    """Let normalisations in float32 write bfloat16 where layers read them that compute in it.

    Args:
        model: as OpenVINO has read it; changed.
        kept: names of the operators that are kept.
    """
    for norm in model.get_ordered_ops():
        if norm.get_type_name() == "MVN":
            last = with_affine(norm)[-1]
            if not any(each.get_type_name() == "Result" or each.get_friendly_name() in kept for each in readers(last)):
                _clamp(last)


def _clamp(operator: Any) -> str:
    """Put a clamp behind an operator of one output; returns its name."""
    from openvino import opset13

    read_by = operator.output(0).get_target_inputs()
    clamp = opset13.clamp(operator.output(0), -float("inf"), float("inf"))
    name = f"{operator.get_friendly_name()}.clamp"
    clamp.set_friendly_name(name)
    for each in read_by:
        each.replace_source_output(clamp.output(0))
    return name
