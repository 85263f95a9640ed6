"""Quantisers in the operators that TorchInductor knows: those of `quantized_decomposed`, with weights as integers.

With frozen weights it makes one kernel of a layer between them (torch/_inductor/fx_passes/quantization.py). Its
patterns do not look at all that they match, so only those layers get integer weights that its kernels compute.
"""

from __future__ import annotations

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators
from torch import nn

from fxopt.modules.fake_quantize import FakeQuantize
from fxopt.modules.stored import StoredValue, StoredWeight, with_integers

_OPS = torch.ops.quantized_decomposed
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention)


def for_inductor(module: nn.Module) -> nn.Module:
    """A copy of `module` whose quantisers TorchInductor fuses; it gives what `module` gives.

    Raises:
        EngineError: for a quantiser that has no range, or is wider than 8 bits, or a batch norm that is not folded.
    """
    return with_integers(module, _value, _weight)


def _value(fake: FakeQuantize) -> nn.Module:
    return fake if fake.axis is not None else _Value(fake)


def _weight(fake: FakeQuantize, weight: torch.Tensor, owner: nn.Module | None) -> nn.Module:
    # Its pattern takes a transposed convolution for a plain one (seen in torch 2.13).
    multiplies = isinstance(owner, _LAYERS) or (owner is None and weight.dim() == 2)
    return (_Weight if multiplies else _Baked)(fake, weight)


class _Value(StoredValue):
    """x  =>  dequantize_per_tensor(quantize_per_tensor(x)), by constants that are no tensors"""

    def __init__(self, fake: FakeQuantize):
        super().__init__(fake)
        kind = self.zero_point.dtype
        limits = torch.iinfo(kind)
        self.constants = (float(self.scale), int(self.zero_point), limits.min, limits.max, kind)

    def quantized(self, input: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _OPS.quantize_per_tensor.default(input, *self.constants)
        return found

    def dequantized(self, stored: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = _OPS.dequantize_per_tensor.default(stored, *self.constants)
        return found


class _Weight(StoredWeight):
    """Whatever it is given  =>  dequantize_per_channel(the integers of the weight), with outputs first"""

    def __init__(self, fake: FakeQuantize, weight: torch.Tensor):
        super().__init__(fake, weight)
        self.turned = fake.axis == 1
        if self.turned:
            self.stored = self.stored.t().contiguous()
        self.scale = self.scale.expand(len(self.stored)).contiguous()
        self.register_buffer("zero_point", torch.zeros_like(self.scale, dtype=torch.int64))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        zero, limits = self.get_buffer("zero_point"), torch.iinfo(torch.int8)
        found: torch.Tensor = _OPS.dequantize_per_channel.default(
            self.stored, self.scale, zero, 0, limits.min, limits.max, torch.int8
        )
        return (found.t() if self.turned else found).to(input.dtype)


class _Baked(nn.Module):
    """Whatever it is given  =>  the values of the weight's integers, as floats"""

    def __init__(self, fake: FakeQuantize, weight: torch.Tensor):
        super().__init__()
        with torch.no_grad():
            self.register_buffer("values", fake(weight))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The weight."""
        return self.get_buffer("values")
