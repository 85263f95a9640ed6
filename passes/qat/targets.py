"""What the integer kernels of each runtime take besides convolutions and linear layers, and why it is not more.

Seen in the models that the runtimes compile: onnxruntime 1.31 (its optimised graph) and OpenVINO 2026.4 (the
primitives of its execution graph); TorchInductor by its patterns (torch/_inductor/fx_passes/quantization.py).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.graph import Affine, Effects, Region, reads_sizes
from fxopt.modules import Fused

Target = Literal["generic", "onnxruntime", "openvino", "inductor"]
TARGETS = get_args(Target)

_NO_PRODUCT = {
    "openvino": "OpenVINO multiplies two computed values in floats, in one kernel with what is around it",
    "inductor": "TorchInductor multiplies two computed values in floats",
}
_NO_ATTENTION = {
    "onnxruntime": "onnxruntime scales queries and keys behind any quantiser, so their product runs in floats",
    **_NO_PRODUCT,
}
_NO_RECURRENT = {
    "onnxruntime": "onnxruntime runs recurrent layers in floats: their weights are integers in the file alone",
    "openvino": "OpenVINO runs recurrent layers in floats: their weights are integers in the file alone",
    "inductor": "TorchInductor runs recurrent layers in floats",
}
_ROUNDS_BIASES: frozenset[str] = frozenset({"onnxruntime"})
_KEEPS_FLOAT_TABLES: frozenset[str] = frozenset({"inductor"})
_POINTWISE = ("gelu", "silu", "hardswish", "hardsigmoid", "tanh", "hardtanh", "elu", "softplus", "mish")
_NORMS = ("layer_norm", "group_norm", "rms_norm", "instance_norm", "softmax")
_POINTWISE_MODULES = (
    nn.GELU, nn.SiLU, nn.Hardswish, nn.Hardsigmoid, nn.Tanh, nn.Hardtanh, nn.ELU, nn.Softplus, nn.Mish
)  # fmt: skip
_NORM_MODULES = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm, nn.Softmax)
POOLS: frozenset[Any] = frozenset(
    {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d}
)
POOL_MODULES = (nn.modules.pooling._AvgPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd)
PASSED_ON: frozenset[Any] = frozenset(
    {F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_max_pool2d, torch.flatten, torch.reshape, torch.squeeze,
     "flatten", "reshape", "view", "squeeze", "contiguous"}
)  # fmt: skip
PASSED_ON_MODULES = (nn.modules.pooling._MaxPoolNd, nn.Flatten, nn.Identity)


def is_call_of(node: fx.Node, region: Region, targets: frozenset[Any], modules: tuple[type[nn.Module], ...]) -> bool:
    """Whether `node` calls one of the functions or methods, or a module of one of the classes, and gives one tensor."""
    if node.op == "call_module":
        module = region.submodule(node)
        return isinstance(module, modules) and not getattr(module, "return_indices", False)
    return node.op in ("call_function", "call_method") and node.target in targets


def why_product_float(node: fx.Node, target: Target) -> str:
    """Why what two computed values make when they are multiplied stays a float; "" where it does not."""
    reasons = _NO_ATTENTION if node.target is F.scaled_dot_product_attention else _NO_PRODUCT
    return reasons.get(target, "")


def why_layer_float(kind: str, target: Target) -> str:
    """Why a convolution or linear layer stays a float; "" where it does not."""
    if target == "inductor" and kind not in ("linear", "conv1d", "conv2d"):
        return f"TorchInductor has no integer kernel for {kind}"
    return ""


def why_input_float(layer: Affine, target: Target) -> str:
    """Why the input of a convolution or linear layer stays a float, where the layer does not; "" where it does not."""
    if target == "openvino" and layer.kind != "linear" and not _depends_on_inputs(layer.input):
        return "its input is a constant: OpenVINO takes the integers of one by another zero point"
    return ""


def _depends_on_inputs(value: fx.Node) -> bool:
    """Whether an input reaches it, by more than its sizes."""
    work, seen = [value], set[fx.Node]()
    while work:
        node = work.pop()
        if node.op == "placeholder":
            return True
        if node not in seen and not reads_sizes(node):
            work += node.all_input_nodes
        seen.add(node)
    return False


def why_recurrent_float(target: Target) -> str:
    """Why the input of a recurrent layer stays a float; "" where it does not."""
    return _NO_RECURRENT.get(target, "")


def rounds_biases(target: Target) -> bool:
    """Whether its convolutions hold a bias as an integer, a multiple of the scales of their input and weight."""
    return target in _ROUNDS_BIASES


def takes_tables(target: Target) -> bool:
    """Whether it reads a table that is added from integers; TorchInductor has them in layers alone."""
    return target not in _KEEPS_FLOAT_TABLES


def why_float(node: fx.Node, region: Region, target: Target) -> str:
    """Why an operator that is no layer, and that no layer takes in, stays a float; "" where nothing is to be said."""
    if target == "generic":
        return ""
    module = region.submodule(node) if node.op == "call_module" else None
    name = getattr(node.target, "__name__", str(node.target)) if module is None else type(module).__name__
    if name in _NORMS or isinstance(module, _NORM_MODULES):
        return f"{name} stays a float: {target} has no integer kernel for it"
    if isinstance(module, Fused) and module.activation is not None:
        name = module.activation.name
    # OpenVINO and TorchInductor compute the activation in the kernel of the layer before it.
    if target == "onnxruntime" and (name in _POINTWISE or isinstance(module, _POINTWISE_MODULES)):
        return f"{name} stays a float: onnxruntime has no integer kernel for it"
    return ""


def is_pooling(node: fx.Node, region: Region, target: Target) -> bool:
    """Whether it averages neighbours, which OpenVINO does on integers once its input is quantised."""
    return target == "openvino" and is_call_of(node, region, POOLS, POOL_MODULES)


def before_what_passes_on(node: fx.Node, value: fx.Node, region: Region, target: Target) -> tuple[fx.Node, fx.Node]:
    """Where OpenVINO wants an input of `node` quantised: before what only picks or moves values on their way to it.

    Returns:
        what reads the value that is to be quantised, and that value.
    """
    if target == "openvino":
        effects = Effects(region)
        while len(value.users) == 1 and is_call_of(value, region, PASSED_ON, PASSED_ON_MODULES):
            if effects.written_between(value, value, node) is not None:
                break
            node, value = value, value.all_input_nodes[0]
    return node, value
