"""Which operators of a quantised model onnxruntime runs on integers, and which it left as floats."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx

from fxopt.contract import Skip

_INTEGER = frozenset(
    "QLinearConv QLinearAdd QLinearMul QLinearMatMul QLinearConcat QLinearAveragePool QLinearGlobalAveragePool "
    "QLinearSigmoid QLinearLeakyRelu QLinearSoftmax QLinearReduceMean QGemm MatMulIntegerToFloat MatMulInteger "
    "ConvInteger DynamicQuantizeMatMul QAttention".split()
)
_FLOAT = frozenset("Conv FusedConv ConvTranspose MatMul FusedMatMul Gemm FusedGemm LSTM GRU".split())


def left_floats(path: Path) -> tuple[Skip, ...]:
    """What onnxruntime computes in floats of the model that it optimised and wrote to `path`.

    The first says how many operators run on integers; each further one names a layer that does not, and why.
    """
    graph = onnx.load(path, load_external_data=False).graph
    made = {output: node for node in graph.node for output in node.output}
    counts = Counter(node.op_type for node in graph.node if node.op_type in _INTEGER)
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.most_common()) or "none"
    skips = [Skip("", f"operators on integers: {listed}")]
    for node in graph.node:
        if node.op_type not in _FLOAT:
            continue
        sources = [made.get(name) for name in node.input[:2]]
        quantised = [source is not None and source.op_type == "DequantizeLinear" for source in sources]
        if all(quantised):
            reason = "its input and weight are integers, but its output is not, or there is no integer kernel for it"
        elif quantised[-1]:
            reason = "its input is not quantised"
        else:
            reason = "its weight is not quantised"
        skips.append(Skip(node.name, f"{node.op_type} runs in floats: {reason}"))
    return tuple(skips)
