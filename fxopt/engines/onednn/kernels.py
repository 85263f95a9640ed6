"""The ways to compute a layer; which one is fastest is measured.

Each takes a `Layer` and gives a function of its input and of what is added, or None where it does not apply. With
`channels_last` all of them give outputs in that memory format, so that no reorder is needed between layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from fxopt.engines.layer import Layer
from fxopt.modules import Activation
from fxopt.modules.functional import tail

Kernel = Callable[..., torch.Tensor]
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
"""By the number of spatial dimensions."""
_mkldnn = torch.ops.mkldnn


def packed(layer: Layer) -> Kernel:
    """oneDNN on a weight in the layout that it likes best, with the activation and the addition as post-ops."""
    if layer.kind == "linear":
        return _packed_linear(layer)
    unary, after = _post_op(layer, _CONV_ATTRS)
    geometry: list[Any] = [list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups]
    if layer.kind == "conv_transpose":
        geometry.insert(1, list(layer.output_padding))
        weight = _mkldnn._reorder_convolution_transpose_weight(_apart(layer.weight), *geometry, list(layer.shape))
        run = _mkldnn._convolution_transpose_pointwise.default
        # No operator adds behind a transposed convolution.
        return _then(lambda x: run(x, weight, layer.bias, *geometry, *unary), after)
    flat = layer.spatial == 1
    shape, plain = list(layer.shape), layer.weight
    if flat:  # oneDNN packs no one-dimensional weights: a row is an image one pixel high
        shape, plain = [*shape[:2], 1, shape[2]], plain.unsqueeze(2)
        geometry = [[0, *layer.padding], [1, *layer.stride], [1, *layer.dilation], layer.groups]
    weight = _mkldnn._reorder_convolution_weight(_apart(plain), *geometry, shape)
    conv = _mkldnn._convolution_pointwise.default
    if flat:

        def rows(x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = conv(x.unsqueeze(2), weight, layer.bias, *geometry, *unary)
            return out.squeeze(2).contiguous()

        return _then(rows, after)
    if layer.other is None:
        return _then(lambda x: conv(x, weight, layer.bias, *geometry, *unary), after)
    return _adding(layer, weight, geometry)


def _apart(weight: torch.Tensor) -> torch.Tensor:
    """A weight to pack: of matrices a copy, which is dropped then.

    What packs matrices asks for memory to write into, and one that shares its memory until it is written would be
    copied for as long as the module lives.
    """
    is_matrix = all(size == 1 for size in weight.shape[2:])
    return weight.clone(memory_format=torch.contiguous_format) if is_matrix else weight


def _adding(layer: Layer, weight: torch.Tensor, geometry: list[Any]) -> Kernel:
    relu = layer.activation is not None and layer.activation.name == "relu"
    options: tuple[Any, ...] = ("add", None, "relu" if relu else None, [], None)
    after = None if relu else layer.activation
    memory_format = FORMATS[layer.spatial]
    bias = layer.bias
    conv, beside = _mkldnn._convolution_pointwise.default, _mkldnn._convolution_pointwise.binary
    into = _mkldnn._convolution_pointwise_.binary
    broadcasting = _then(lambda x: conv(x, weight, bias, *geometry, "none", [], ""), layer.activation)

    def add(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        if not layer.gives_the_shape_of(other, x):
            return broadcasting(x, other)
        other = other.contiguous(memory_format=memory_format)
        both = (other, x) if layer.reuses else (x, other)
        out: torch.Tensor = (into if layer.reuses else beside)(*both, weight, bias, *geometry, *options)
        return out if after is None else after.apply_(out)

    return add


def _packed_linear(layer: Layer) -> Kernel:
    weight = _mkldnn._reorder_linear_weight(_apart(layer.weight), places(layer))
    bias = layer.bias
    run = _mkldnn._linear_pointwise.default
    if layer.other is not None:
        adding = _mkldnn._linear_pointwise.binary
        after = layer.activation
        broadcasting = _then(lambda x: run(x, weight, bias, "none", [], ""), after)

        def add(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            if not layer.gives_the_shape_of(other, x):
                return broadcasting(x, other)
            out: torch.Tensor = adding(x, other, weight, bias, "add")
            return out if after is None else after.apply_(out)

        return add
    unary, after = _post_op(layer, _LINEAR_ATTRS)
    return _then(lambda x: run(x, weight, bias, *unary), after)


def mkl(layer: Layer) -> Kernel | None:
    """MKL's matrix product on a packed weight."""
    if not layer.is_pointwise or layer.weight.dtype is not torch.float32 or not torch.backends.mkl.is_available():
        return None
    if places(layer) == 0:
        return None
    plain = layer.weight.flatten(1).contiguous()
    rows = places(layer)
    weight = torch.ops.mkl._mkl_reorder_linear_weight(_apart(plain), rows)
    run = torch.ops.mkl._mkl_linear.default
    bias = layer.bias
    return _over_channels(layer, lambda x: run(x, weight, plain, bias, rows))


def matmul(layer: Layer) -> Kernel | None:
    """A 1x1 convolution as a plain matrix product, which costs less to call."""
    if not layer.is_pointwise or layer.kind == "linear":
        return None
    weight = layer.weight.flatten(1).t().contiguous()
    bias = layer.bias
    if bias is None:
        return _over_channels(layer, lambda x: torch.mm(x, weight))
    return _over_channels(layer, lambda x: torch.addmm(bias, x, weight))


def plain(layer: Layer) -> Kernel:
    """As torch runs it, in channels_last."""
    memory_format = FORMATS.get(layer.spatial)
    if memory_format is None:
        return _then(_operator(layer, layer.weight), layer.activation)
    run = _operator(layer, layer.weight.contiguous(memory_format=memory_format))
    return _then(lambda x: run(x.contiguous(memory_format=memory_format)), layer.activation)


def apart(layer: Layer) -> Kernel | None:
    """As torch runs it without channels_last, whose kernels for few groups are slow; reordered before and after."""
    if layer.groups == 1 or layer.spatial not in FORMATS:
        return None
    run, memory_format = _operator(layer, layer.weight.contiguous()), FORMATS[layer.spatial]
    return _then(lambda x: run(x.contiguous()).contiguous(memory_format=memory_format), layer.activation)


KERNELS: Mapping[str, Callable[[Layer], Kernel | None]] = {
    "packed": packed,
    "mkl": mkl,
    "matmul": matmul,
    "plain": plain,
    "apart": apart,
}
"""By the name that a saved choice has."""


def _operator(layer: Layer, weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    bias = layer.bias
    if layer.kind == "linear":
        return lambda x: F.linear(x, weight, bias)
    function: Any = getattr(F, f"{layer.kind}{layer.spatial}d")
    geometry: tuple[Any, ...] = (layer.stride, layer.padding, layer.dilation, layer.groups)
    if layer.kind == "conv_transpose":
        geometry = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
    return lambda x: function(x, weight, bias, *geometry)


def _over_channels(layer: Layer, product: Callable[[torch.Tensor], torch.Tensor]) -> Kernel:
    """A product over the last dimension as a layer: the places of an image are the rows of a matrix."""
    activation = layer.activation
    if layer.kind == "linear":
        return _then(product, activation)
    vertical, horizontal = layer.stride
    strided = vertical > 1 or horizontal > 1
    inputs, outputs = layer.weight.shape[1], layer.weight.shape[0]

    def run(x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        if strided:
            x = x[:, :, ::vertical, ::horizontal]
        batch, _, height, width = x.shape
        out = product(x.permute(0, 2, 3, 1).reshape(-1, inputs))
        return tail(out.view(batch, height, width, outputs).permute(0, 3, 1, 2), other, activation)

    return run


def _then(run: Callable[[torch.Tensor], torch.Tensor], activation: Activation | None) -> Kernel:
    def kernel(x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        out = run(x)
        if other is None:
            return out if activation is None else activation.apply_(out)
        return tail(out, other, activation)

    return kernel


def places(layer: Layer) -> int:
    """How often its weight is applied in all rows: for a matrix product the rows of the matrix that its input is."""
    if layer.kind == "linear":
        return math.prod(layer.shape[:-1])
    steps = [-(-size // step) for size, step in zip(layer.shape[2:], layer.stride, strict=True)]
    return int(layer.shape[0]) * math.prod(steps)


# By name of the activation: the attribute of oneDNN, its scalars by argument, its algorithm.
_CONV_ATTRS: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "relu": ("relu", ()),
    "relu6": ("hardtanh", (0.0, 6.0)),
    "hardtanh": ("hardtanh", ("min_val", "max_val")),
    "leaky_relu": ("leaky_relu", ("negative_slope",)),
    "silu": ("swish", ()),
    "gelu": ("gelu", ()),
    "hardswish": ("hardswish", ()),
    "hardsigmoid": ("hardsigmoid", ()),
    "sigmoid": ("sigmoid", ()),
    "tanh": ("tanh", ()),
}
_LINEAR_ATTRS = {name: _CONV_ATTRS[name] for name in ("relu", "gelu", "silu", "sigmoid", "tanh", "leaky_relu")}


def _post_op(
    layer: Layer, table: Mapping[str, tuple[str, tuple[Any, ...]]]
) -> tuple[tuple[str, list[Any], str], Activation | None]:
    """Attribute, scalars and algorithm that a product computes its activation by; and what is left of it for later.

    That is all of it where something is added before.
    """
    activation = layer.activation
    if activation is None or layer.other is not None or activation.name not in table:
        return ("none", [], ""), activation
    attr, scalars = table[activation.name]
    arguments = dict(activation.arguments)
    values = [arguments[scalar] if isinstance(scalar, str) else scalar for scalar in scalars]
    return (attr, values, str(arguments.get("approximate", "none")) if attr == "gelu" else ""), None
