"""What stays in float32 where the rest of a model computes in bfloat16."""

from __future__ import annotations

from typing import Any

from fxopt.errors import EngineError

_KEEPS = frozenset({"Add", "MVN"})
_READS_INPUTS = frozenset({"Convolution", "GroupConvolution", "MatMul"})
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


def keep_in_float32(core: Any, model: Any) -> None:
    """Mark the sums and normalisations of a model, and the layers that read its inputs, as not to be rounded.

    What a residual network hands on from block to block is a sum, and each rounding of it stays in all that follows. In
    float32 it costs a transformer a few percent of its time at most, and takes a third to a half off its error.

    Raises:
        EngineError: where this OpenVINO does not know the mark.
    """
    key, mark = _mark(core)
    for operator in model.get_ops():
        kind = operator.get_type_name()
        if kind in _KEEPS or (kind in _READS_INPUTS and _reads_an_input(operator)):
            operator.set_rt_info(mark, key)


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
