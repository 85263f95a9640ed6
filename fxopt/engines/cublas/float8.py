"""Linear layers of any module in float8, with a scale for each row of the input and each output."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from fxopt.contract import Skip
from fxopt.engines.cublas.candidate import Candidate, Kernel
from fxopt.engines.layer import Layer
from fxopt.engines.layers import Layers
from fxopt.engines.onednn.kernels import plain
from fxopt.modules.functional import tail

_DTYPE = torch.float8_e4m3fn
_LARGEST = torch.finfo(_DTYPE).max
_SMALLEST = 1e-12
_MULTIPLE = 16
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def candidates(found: Layers) -> Iterator[Candidate | Skip]:
    """Its linear layers, and why any can't be multiplied in float8."""
    yield from found.reasons[::-1]
    noticed = found.noticed()
    for layer in reversed(found.layers):
        reason = noticed.get(layer) or _why_not(layer)
        skip = functools.partial(found.skip, layer)
        if reason is not None:
            yield skip(f"it runs as torch runs it: {reason}")
            continue
        kernel = float8_linear(layer)
        shapes = [layer.shape] if layer.other is None else [layer.shape, (*layer.shape[:-1], len(layer.weight))]
        given = tuple(torch.randn(shape).to(layer.weight) for shape in shapes)
        put = functools.partial(found.put, layer, kernel)
        yield Candidate(found.key(layer), skip, kernel, plain(layer), given, put)


def supported(dtype: torch.dtype) -> str | None:
    """Why there are no kernels for a dtype."""
    return None if dtype in _DTYPES else f"products in float8 give floats, and this is {dtype}"


def float8_linear(layer: Layer) -> Kernel:
    """A linear layer whose product is one of float8.

    Weights are rounded here, by one scale an output; inputs in each call, by one scale a row (Micikevicius et al.
    2022, "FP8 formats for deep learning"). It adds the products up in float32 and gives them in bfloat16, whatever the
    dtype of the layer.
    """
    weight, by_output = _rounded(layer.weight.contiguous())
    width = weight.shape[1]

    def run(x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        rows, by_row = _rounded(x.reshape(-1, width))
        product = torch._scaled_mm(rows, weight.t(), by_row, by_output.t(), out_dtype=torch.bfloat16)
        found = product.to(x.dtype).reshape(*x.shape[:-1], len(weight))
        return tail(found if layer.bias is None else found + layer.bias, other, layer.activation)

    return run


def _why_not(layer: Layer) -> str | None:
    if layer.kind != "linear":
        return "cuBLASLt multiplies matrices, and this is a convolution"
    outputs, inputs = layer.weight.shape
    if outputs % _MULTIPLE or inputs % _MULTIPLE:
        return f"products take features that are multiples of {_MULTIPLE}, here they are {inputs} to {outputs}"
    return None


def _rounded(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of float8, and the scale of each as a column."""
    scale = rows.abs().amax(1, keepdim=True).float().clamp_(min=_SMALLEST) / _LARGEST
    return (rows / scale).to(_DTYPE).contiguous(), scale
