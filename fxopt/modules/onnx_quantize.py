"""Quantisers in the form that ONNX knows: QuantizeLinear and DequantizeLinear, with weights as integers.

These can be exported but not run: torch has no kernel behind ONNX's operators.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.errors import EngineError
from fxopt.modules.fake_quantize import FakeQuantize
from fxopt.modules.fused import Fused, FusedLinear
from fxopt.modules.quantized import SUFFIX, QuantizedEmbedding, quantized_weights

_BYTE = 8


def for_onnx(module: nn.Module) -> nn.Module:
    """A copy of `module` whose quantisers export as ONNX's own; weights that were quantised are int8 in the file.

    Integers narrower than 8 bits stand in int8 and uint8, since no runtime computes in fewer: their values are the
    same, and for inputs a Clip keeps them in range.

    Raises:
        EngineError: for a quantiser that has no range, or is wider than 8 bits, or a batch norm that is not folded.
    """
    duplicate = copy.deepcopy(module).eval()
    for path, owner, leaf, fake in list(quantized_weights(duplicate)):
        _check(f"{path}.{leaf}{SUFFIX}", fake)
        if isinstance(owner, Fused) and owner.bn is not None:
            raise EngineError(f"{path!r} still holds its batch norm: run 'quantize-freeze', which folds it")
        weight = owner.scaled_weight() if isinstance(owner, Fused) else owner.get_parameter(leaf)
        stored = _Weight(fake, weight)
        if isinstance(owner, QuantizedEmbedding):
            duplicate.set_submodule(path, _Rows(stored))
        else:
            owner._modules[f"{leaf}{SUFFIX}"] = stored
        if isinstance(owner, FusedLinear):
            owner.__dict__["_operate"] = _product
    for graph in [child for child in duplicate.modules() if isinstance(child, fx.GraphModule)]:
        for name, fake, weight in list(_quantized_parameters(graph)):
            _check(name, fake)
            graph.set_submodule(name, _Weight(fake, weight))
    for name, child in list(duplicate.named_modules()):
        if isinstance(child, FakeQuantize):
            _check(name, child)
            duplicate.set_submodule(name, _Value(child))
    return duplicate


def _product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output_size: None) -> torch.Tensor:
    """F.linear as MatMul and Add: what it exports as for two dimensions, Gemm, takes no float bias among integers."""
    out = input @ weight.t()
    return out if bias is None else out + bias


def _quantized_parameters(graph: fx.GraphModule) -> Iterator[tuple[str, FakeQuantize, torch.Tensor]]:
    """The quantisers of parameters that the graph hands to functions: name, quantiser, parameter."""
    for node in graph.graph.nodes:
        fake = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(fake, FakeQuantize) and node.args[0].op == "get_attr":
            owner, _, leaf = str(node.args[0].target).rpartition(".")
            parameter = graph.get_submodule(owner)._parameters.get(leaf)
            if parameter is not None:
                yield str(node.target), fake, parameter


def _check(name: str, fake: FakeQuantize) -> None:
    if not fake.ready:
        raise EngineError(f"{name!r} never observed anything, so it has no range: calibrate, or run 'quantize-freeze'")
    if fake.bits > _BYTE:
        raise EngineError(f"{name!r} has {fake.bits} bits, and onnxruntime's integer kernels take at most {_BYTE}")


class _Value(nn.Module):
    """x  =>  DequantizeLinear(QuantizeLinear(x))"""

    def __init__(self, fake: FakeQuantize):
        super().__init__()
        kind = torch.int8 if fake.symmetric else torch.uint8
        self.axis = fake.axis
        self.low, self.high = fake.low, fake.high
        self.bits = fake.bits
        self.register_buffer("scale", fake.scale.detach().abs())
        self.register_buffer("zero_point", fake.zero_point.to(kind))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The same values, through an integer."""
        scale, zero = self.get_buffer("scale"), self.get_buffer("zero_point")
        if self.bits < _BYTE:
            whole = zero.to(torch.float32)
            input = torch.clamp(input, (self.low - whole) * scale, (self.high - whole) * scale)
        attributes: dict[str, Any] = {} if self.axis is None else {"axis": self.axis}
        stored = torch.onnx.ops.symbolic(
            "QuantizeLinear",
            (input, scale, zero),
            attributes,
            dtype=zero.dtype,
            shape=input.shape,
        )
        return _dequantized(stored, scale, zero, attributes)


class _Weight(nn.Module):
    """Whatever it is given  =>  DequantizeLinear(the integers of the weight)"""

    def __init__(self, fake: FakeQuantize, weight: torch.Tensor):
        super().__init__()
        scale, shape = fake.scale.detach().abs(), [1] * weight.dim()
        if fake.axis is not None:
            shape[fake.axis] = -1
        self.axis = fake.axis
        places = (weight.detach() / scale.reshape(shape)).round().clamp(fake.low, fake.high)
        self.register_buffer("stored", places.to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", torch.zeros_like(fake.zero_point, dtype=torch.int8))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The weight, from its integers."""
        attributes: dict[str, Any] = {} if self.axis is None else {"axis": self.axis}
        return _dequantized(
            self.get_buffer("stored"), self.get_buffer("scale"), self.get_buffer("zero_point"), attributes
        )


class _Rows(nn.Module):
    """ids  =>  the rows of the weight's integers, times their scales: the rest of the table stays integers"""

    def __init__(self, weight: _Weight):
        super().__init__()
        self.by_row = weight.axis == 0
        self.register_buffer("stored", weight.get_buffer("stored"))
        self.register_buffer("scale", weight.get_buffer("scale").reshape(-1, 1))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The rows."""
        scale = self.get_buffer("scale")
        rows = F.embedding(input, self.get_buffer("stored")).to(torch.float32)
        return rows * (F.embedding(input, scale) if self.by_row else scale.reshape(()))


def _dequantized(
    stored: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, attributes: dict[str, Any]
) -> torch.Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear",
        (stored, scale, zero),
        attributes,
        dtype=torch.float32,
        shape=stored.shape,
    )
