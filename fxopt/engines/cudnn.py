"""cuDNN's fused operators on CUDA: convolution, bias, addition and ReLU as one call, in channels_last."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from fxopt.engines.binding import bind
from fxopt.engines.contract import Built, Engine
from fxopt.engines.gpu import TF32_TOLERANCE, products_in_float32, why_no_gpu
from fxopt.engines.layer import Layer
from fxopt.engines.layers import Layers
from fxopt.engines.strides import hide
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.modules.functional import tail
from fxopt.rewriting import propagate_shapes

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class CuDNN(Engine):
    """Two-dimensional convolutions with a ReLU behind them, and those with an addition too, as one operator.

    Everything else runs as torch runs it, the whole graph in channels_last. Without `tf32` products of float32 are
    computed in float32, whatever torch is set to; with it they lose 13 of 23 bits and gain speed.
    """

    name: ClassVar[str] = "cudnn"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    tf32: bool = field(default=False, metadata={"help": "round the operands of float32 products to TF32"})

    def unavailable(self) -> str | None:
        """It needs a GPU, and a torch with cuDNN."""
        if torch.cuda.is_available() and not torch.backends.cudnn.is_available():
            return "this torch has no cuDNN; `pip install torch` brings a build that has"
        return why_no_gpu()

    def tolerance(self, dtype: torch.dtype) -> float:
        """That of TF32 where it is asked for."""
        return max(super().tolerance(dtype), TF32_TOLERANCE if self.tf32 else 0.0)

    def build(self, module: GraphModule, inputs: Inputs, choices: Mapping[str, Any]) -> Built:
        """See `Engine.build`; shapes are written into the metadata of the module's nodes."""
        propagate_shapes(module, inputs)
        found = Layers(module, _supported)
        noticed, reasons = found.noticed(), found.reasons[::-1]
        for region in found.regions:
            hide(region)
        for layer in reversed(found.layers):
            why = noticed.get(layer)
            kernel = fused_kernel(layer) if why is None else f"it runs as torch runs it: {why}"
            if isinstance(kernel, str):
                reasons.append(found.skip(layer, kernel))
            else:
                found.put(layer, kernel)
        run = bind(found.root)

        def with_precision(*args: Any, **kwargs: Any) -> Any:
            cudnn = torch.backends.cudnn
            before = cudnn.enabled, cudnn.benchmark
            cudnn.enabled = cudnn.benchmark = True
            try:
                with products_in_float32(tf32=self.tf32):
                    return run(*args, **kwargs)
            finally:
                cudnn.enabled, cudnn.benchmark = before

        return Built(with_precision, tuple(reasons), holds=(found.root,))


def fused_kernel(layer: Layer) -> Callable[..., torch.Tensor] | str:
    """What computes a layer, or why torch does."""
    if layer.spatial != 2 or layer.kind != "conv":
        return f"cuDNN fuses two-dimensional convolutions, this is '{layer.kind}' of {layer.spatial} dimensions"
    if layer.activation is None or layer.activation.name != "relu":
        return f"cuDNN fuses a ReLU behind a convolution, here is {layer.activation or 'none'}"
    weight = layer.weight.contiguous(memory_format=torch.channels_last)
    bias = layer.bias
    # cuDNN's operators take the stride before the padding.
    geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def relu(x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.cudnn_convolution_relu(x, weight, bias, *geometry)

    def add_relu(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        x, other = (value.contiguous(memory_format=torch.channels_last) for value in (x, other))
        if not layer.gives_the_shape_of(other, x):
            return tail(F.conv2d(x, weight, bias, *geometry), other, layer.activation)
        return torch.cudnn_convolution_add_relu(x, weight, other, 1.0, bias, *geometry)

    return relu if layer.other is None else add_relu


def _supported(dtype: torch.dtype) -> str | None:
    return None if dtype in _DTYPES else f"cuDNN has no fused kernels for {dtype}"
