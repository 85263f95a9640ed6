"""Which operators TorchInductor runs on integers, read off the graphs that it generates code for."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch.fx as fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from fxopt.contract import Skip
from fxopt.engines.integers import counted

_KERNELS = {"qconv_pointwise": "qconv", "qconv2d_pointwise": "qconv", "qlinear_pointwise": "qlinear"}
_FLOAT = frozenset(
    "convolution _convolution_pointwise _convolution_transpose_pointwise _linear_pointwise _mkl_linear addmm mm bmm "
    "baddbmm mkldnn_rnn_layer _scaled_dot_product_flash_attention_for_cpu".split()
)


class CountIntegers(CustomGraphPass):
    """Changes nothing, and notes what runs on integers and each layer that does not, with the reason.

    Args:
        found: the notes, of which the first says how many operators run on integers.
    """

    def __init__(self, found: list[Skip]):
        self._found = found
        self._counts: Counter[str] = Counter()
        self._left: list[Skip] = []

    def __call__(self, graph: fx.Graph) -> None:
        """Note the operators of one graph, once for each that is compiled for the example."""
        for node in graph.nodes:
            name = getattr(node.target, "_opname", "")
            if name in _KERNELS:
                self._counts[_KERNELS[name]] += 1
            elif name in _FLOAT:
                self._left.append(Skip(_where(node), f"{name} runs in floats: {_why(node)}"))
        self._found[:] = [counted(self._counts), *self._left]

    def uuid(self) -> Any:
        """None: what was compiled before must be compiled again, or nothing would be seen."""
        return None


def _why(node: fx.Node) -> str:
    sources = {str(source.target) for source in node.all_input_nodes}
    value = any("dequantize_per_tensor" in source for source in sources)
    weight = any("dequantize_per_channel" in source for source in _upstream(node))
    if value and weight:
        return "TorchInductor has no integer kernel for it in this form"
    if weight:
        return "its input is not quantised, or it reads it in another order"
    if value:
        return "its weight is not quantised, or there is no integer kernel for it"
    return "neither its input nor its weight is quantised, or there is no integer kernel for it"


def _upstream(node: fx.Node) -> set[str]:
    """What gives its inputs, beyond one step that only moves values."""
    near = node.all_input_nodes
    return {str(source.target) for each in near for source in (each, *each.all_input_nodes)}


def _where(node: fx.Node) -> str:
    """The qualified name of the module that calls it."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    steps = re.findall(r"(?:_modules'\]\[|, )'([^']+)'|\.(?!__dict__)(\w+)", stack[-1][0] if stack else "")
    return ".".join(one or other for one, other in steps) or node.name
