"""Which operators of a quantised model a runtime runs on integers, and which it left as floats."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from fxopt.contract import Skip

_INTEGER = frozenset(
    "QLinearConv QLinearAdd QLinearMul QLinearMatMul QLinearConcat QLinearAveragePool QLinearGlobalAveragePool "
    "QLinearSigmoid QLinearLeakyRelu QLinearSoftmax QLinearReduceMean QGemm MatMulIntegerToFloat MatMulInteger "
    "ConvInteger DynamicQuantizeMatMul QAttention".split()
)
_OPENVINO = frozenset("Convolution Deconvolution FullyConnected MatMul RNNCell RNNSeq".split())
_OPENVINO_BESIDES = frozenset("Pooling Concatenation Eltwise".split())
_FLOAT = frozenset("Conv FusedConv ConvTranspose MatMul FusedMatMul Gemm FusedGemm LSTM GRU".split())


def left_floats(path: Path) -> tuple[Skip, ...]:
    """What onnxruntime computes in floats of the model that it optimised and wrote to `path`.

    The first says how many operators run on integers; each further one names a layer that does not, and why.
    """
    graph = onnx.load(path, load_external_data=False).graph
    made = {output: node for node in graph.node for output in node.output}
    skips = [counted(Counter(node.op_type for node in graph.node if node.op_type in _INTEGER))]
    for node in graph.node:
        if node.op_type not in _FLOAT:
            continue
        sources = [made.get(name) for name in node.input[:2]]
        quantised = [source is not None and source.op_type == "DequantizeLinear" for source in sources]
        if node.op_type in ("LSTM", "GRU"):
            reason = "onnxruntime has no integer kernel for it; its weights are integers in the file alone"
        elif all(quantised):
            reason = (
                "its input and weight are integers, but its output is not (`target=onnxruntime` of 'qat' and 'ptq' "
                "quantises those that it can), or there is no integer kernel for it"
            )
        elif quantised[-1]:
            reason = "its input is not quantised"
        elif sources[-1] is not None:
            reason = "it multiplies two computed values, not both of them quantised"
        else:
            reason = "its weight is not quantised"
        skips.append(Skip(node.name, f"{node.op_type} runs in floats: {reason}"))
    return tuple(skips)


def left_floats_by_openvino(compiled: Any) -> tuple[Skip, ...]:
    """The same of what OpenVINO compiled, by the primitives that it chose.

    Products of attention are none of them where OpenVINO fuses all of it into one float kernel.
    """
    counts: Counter[str] = Counter()
    skips = []
    for operator in compiled.get_runtime_model().get_ordered_ops():
        facts = operator.get_rt_info()
        keys = ("layerType", "primitiveType", "originalLayersNames")
        kind, primitive, names = (facts[key].astype(str) for key in keys)
        if kind in _OPENVINO | _OPENVINO_BESIDES and primitive.endswith(("_I8", "_U8")):
            counts[kind] += 1
        elif kind in _OPENVINO:
            reason = (
                f"{kind} runs in floats ({primitive}): not all that it multiplies is quantised, or it has no integer"
            )
            skips.append(Skip(operator.get_friendly_name(), f"{reason} kernel"))
        elif kind == "Subgraph" and (products := _quantised_products(names.split(","))):
            reason = f"{products} MatMul run in one kernel with what is around them: OpenVINO says of it no more"
            skips.append(Skip(operator.get_friendly_name(), reason))
    return (counted(counts), *skips)


def _quantised_products(names: list[str]) -> int:
    """How many of the operators that OpenVINO made one of multiply integers, going by what it names them."""
    return sum("matmul" in name.lower() and f"{name}/DequantizationMultiply" in names for name in names)


def counted(counts: Counter[str]) -> Skip:
    """The line that says how many operators run on integers."""
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.most_common()) or "none"
    return Skip("", f"operators on integers: {listed}")
