"""What stays in float32 where the rest of a model computes in bfloat16."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fxopt.engines.openvino.rounding import LAYERS
from fxopt.errors import EngineError

_KEEPS = frozenset({"Add", "MVN", "Interpolate"})
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

    Args:
        model: as OpenVINO has read it.
        share: of the layers, in the order in which they are computed: they and all that lies before the next layer are
            kept. Those that read the inputs are kept in any case.
    """
    operators = model.get_ordered_ops()
    layers = [index for index, operator in enumerate(operators) if operator.get_type_name() in LAYERS]
    count = round(share * len(layers))
    end = layers[count] if count < len(layers) else len(operators)
    first = {operator.get_friendly_name() for operator in operators[: end if count else 0]}
    return first | {operator.get_friendly_name() for operator in operators if _is_kept(operator)}


def mark(core: Any, model: Any, names: Collection[str]) -> None:
    """Tell OpenVINO to leave the operators of these names in float32.

    Raises:
        EngineError: where this OpenVINO does not know how.
    """
    key, value = _mark(core)
    for operator in model.get_ops():
        if operator.get_friendly_name() in names:
            operator.set_rt_info(value, key)


def _is_kept(operator: Any) -> bool:
    kind = operator.get_type_name()
    return kind in _KEEPS or (kind in LAYERS and _reads_an_input(operator))


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


def _reads_an_input(operator: Any) -> bool:
    return any(value.get_source_output().get_node().get_type_name() == "Parameter" for value in operator.inputs())
