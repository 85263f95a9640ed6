"""What stays in float32 where the rest of a model computes in bfloat16."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fxopt.engines.openvino.rounding import LAYERS, constant_behind
from fxopt.errors import EngineError

_KEEPS = frozenset({"MVN", "Interpolate"})
_MOVES = frozenset(
    "Reshape Transpose Concat Squeeze Unsqueeze Split VariadicSplit Slice StridedSlice Gather Broadcast Roll".split()
)
_ATTRIBUTE = "DisablePrecisionConversion"
_MARKED = f"""<?xml version="1.0"?>
<net name="marked" version="11">
  <layers>
    <layer id="0" name="x" type="Parameter" version="opset1">
      <data shape="1" element_type="f32"/>
      <output><port id="0" precision="FP32"><dim>1</dim></port></output>
    </layer>
    <layer id="1" name="marked" type="ReLU" version="opset1">
      <rt_info><attribute name="{_ATTRIBUTE}" version="0" value="dynamic:f16"/></rt_info>
      <input><port id="0" precision="FP32"><dim>1</dim></port></input>
      <output><port id="1" precision="FP32"><dim>1</dim></port></output>
    </layer>
    <layer id="2" name="y" type="Result" version="opset1">
      <input><port id="0" precision="FP32"><dim>1</dim></port></input>
    </layer>
  </layers>
  <edges>
    <edge from-layer="0" from-port="0" to-layer="1" to-port="0"/>
    <edge from-layer="1" from-port="1" to-layer="2" to-port="0"/>
  </edges>
</net>"""


def kept_in_float32(model: Any, share: float) -> set[str]:
    """The operators that are not to be rounded: sums, normalisations, resizes, and the first layers.

    What a residual network hands on from block to block is a sum, and each rounding of it stays in all that follows. In
    float32 it costs a transformer a few percent of its time at most, and takes a third to a half off its error.

    What only moves, scales or shifts the values that one of them reads is kept with it. OpenVINO would round there, and
    takes the layout of all sums from the first one's input, if both have the same type: else each is transposed.

    Args:
        model: as OpenVINO has read it.
        share: of the layers, in the order in which they are computed: they and all that lies before the next layer are
            kept; one layer at least, but for a share of 0.
    """
    operators = model.get_ordered_ops()
    layers = [index for index, operator in enumerate(operators) if operator.get_type_name() in LAYERS]
    count = max(1, round(share * len(layers))) if share else 0
    end = layers[count] if count < len(layers) else len(operators)
    kept = {operator.get_friendly_name() for operator in operators[: end if count else 0]}
    for operator in operators:
        if operator.get_type_name() == "MVN":
            kept |= {each.get_friendly_name() for each in with_affine(operator)}
    for operator in reversed(operators):
        read_by = {reader.get_friendly_name() for reader in readers(operator)}
        if _is_kept(operator) or (_hands_on(operator) and not kept.isdisjoint(read_by)):
            kept.add(operator.get_friendly_name())
    return kept


def mark(core: Any, model: Any, names: Collection[str]) -> None:
    """Tell OpenVINO to leave the operators of these names in float32.

    Raises:
        EngineError: where this OpenVINO does not know how.
    """
    key, value = _mark(core)
    for operator in model.get_ops():
        if operator.get_friendly_name() in names:
            operator.set_rt_info(value, key)


def readers(operator: Any) -> list[Any]:
    """The operators that read an output of one."""
    return [each.get_node() for port in operator.outputs() for each in port.get_target_inputs()]


def with_affine(norm: Any) -> list[Any]:
    """A normalisation, with the scale and the shift behind it."""
    found = [norm]
    while len(read_by := readers(found[-1])) == 1 and shifts_or_scales(read_by[0]):
        found += read_by
    return found


def shifts_or_scales(operator: Any) -> bool:
    """Whether it adds a constant or multiplies by one that has a value for each channel, or one for all."""
    if operator.get_type_name() not in ("Add", "Multiply"):
        return False
    constants = filter(None, map(constant_behind, operator.input_values()))
    return any(sum(size != 1 for size in constant.get_output_shape(0)) <= 1 for constant in constants)


def _is_kept(operator: Any) -> bool:
    kind = operator.get_type_name()
    if kind != "Add" or shifts_or_scales(operator):
        return kind in _KEEPS
    # What a softmax reads is a part of attention, which OpenVINO computes by one kernel.
    return not any(reader.get_type_name() == "Softmax" for reader in readers(operator))


def _hands_on(operator: Any) -> bool:
    return operator.get_type_name() in _MOVES or shifts_or_scales(operator)


def _mark(core: Any) -> tuple[str, Any]:
    """The mark, with the key that it has: Python can't make one, so it is taken from a model in which one is written.

    It is the one that `EnforceInferencePrecision` of OpenVINO's CPU plugin asks for.
    """
    operators = core.read_model(model=_MARKED.encode(), weights=b"").get_ops()
    facts = [fact for operator in operators for fact in operator.get_rt_info().items()]
    found = next(((key, mark) for key, mark in facts if key.startswith(_ATTRIBUTE)), None)
    if found is None:
        raise EngineError(
            "engine 'openvino': this version can't keep operators in float32; upgrade it, or give precision=bf16"
        )
    return found
