"""Quantisers in the form that ONNX knows: QuantizeLinear and DequantizeLinear, with weights as integers.

These can be exported but not run: torch has no kernel behind ONNX's operators.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fxopt.modules.fake_quantize import FakeQuantize
from fxopt.modules.fused import FusedLinear
from fxopt.modules.stored import StoredValue, StoredWeight, with_integers


def for_onnx(module: nn.Module) -> nn.Module:
    """A copy of `module` whose quantisers export as ONNX's own; weights that were quantised are int8 in the file.

    Integers narrower than 8 bits stand in int8 and uint8, since no runtime computes in fewer: their values are the
    same, weights as multiples of 2^(7 - bits), and a Clip keeps inputs in range.

    Raises:
        EngineError: for a quantiser that has no range, or is wider than 8 bits, or a batch norm that is not folded.
    """
    return with_integers(module, _Value, _weight)


def _weight(fake: FakeQuantize, weight: torch.Tensor, owner: nn.Module | None) -> nn.Module:
    if isinstance(owner, FusedLinear):
        owner.__dict__["_operate"] = _product
    return _Weight(fake, weight)


def _product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, output_size: None) -> torch.Tensor:
    """F.linear as MatMul and Add: what it exports as for two dimensions, Gemm, takes no float bias among integers."""
    out = input @ weight.t()
    return out if bias is None else out + bias


class _Value(StoredValue):
    """x  =>  DequantizeLinear(QuantizeLinear(x))"""

    def quantized(self, input: torch.Tensor) -> torch.Tensor:
        zero = self.zero_point
        return torch.onnx.ops.symbolic(
            "QuantizeLinear", (input, self.scale, zero), _along(self.axis), dtype=zero.dtype, shape=input.shape
        )

    def dequantized(self, stored: torch.Tensor) -> torch.Tensor:
        return _dequantized(stored, self.scale, self.zero_point, self.axis)


class _Weight(StoredWeight):
    """Whatever it is given  =>  DequantizeLinear(the integers of the weight)"""

    def __init__(self, fake: FakeQuantize, weight: torch.Tensor):
        super().__init__(fake, weight)
        self.register_buffer("zero_point", torch.zeros_like(fake.zero_point, dtype=torch.int8))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _dequantized(self.stored, self.scale, self.get_buffer("zero_point"), self.axis)


def _dequantized(stored: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, axis: int | None) -> torch.Tensor:
    return torch.onnx.ops.symbolic(
        "DequantizeLinear", (stored, scale, zero), _along(axis), dtype=torch.float32, shape=stored.shape
    )


def _along(axis: int | None) -> dict[str, Any]:
    return {} if axis is None else {"axis": axis}
