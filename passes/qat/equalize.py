"""Evens out the ranges of weights and inputs before they are quantised, with the same outputs.

Between two layers that only a ReLU separates (or nothing), any channel may be scaled down on one side and up on the
other (cross-layer equalization, Nagel et al. 2019, section 4.1):

    W2 relu(W1 x + b1)  =  (W2 S) relu(S^-1 W1 x + S^-1 b1)     s_i = sqrt(max|W1_i| / max|W2_i|)

Behind a layer norm the scale goes into its affine parameters (SmoothQuant, Xiao et al. 2023):

    W LN(x)  =  (W S) (LN(x) / s)     s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)
"""

from __future__ import annotations

import torch
import torch.fx as fx
from torch import nn

from fxopt.contract import Change
from fxopt.graph import Affine, Program, Region, read_affine, source_of, why_not_plain
from fxopt.modules import FakeQuantize, Fused, rebuild

_SCALES_ALONG = ("relu", "leaky_relu")
_ROUNDS = 3


def equalize_layers(region: Region) -> list[Change]:
    """Equalize each pair of layers of which the second is all that reads the first."""
    pairs = []
    for node in region.graph.nodes:
        second = _alone(node, region)
        first = None if second is None else _alone(second.input, region)
        if first is not None and second is not None and _fit(first, second) and _multiplies(second, first.node):
            pairs.append((first.node, node))
    for _ in range(_ROUNDS):  # a layer between two others takes part in two pairs
        for one, two in pairs:
            _equalize(read_affine(one, region), read_affine(two, region), region)
    return [
        Change(
            f"ranges of its channels evened out with '{region.qualified(two)}'", region.qualified(one), source_of(one)
        )
        for one, two in pairs
    ]


def smooth(region: Region, norm: fx.Node, layers: list[Affine], largest: torch.Tensor, alpha: float) -> Change:
    """Move the outliers of what a layer norm gives into the weights of the layers that read it.

    Args:
        region: where they are.
        norm: the call of the layer norm.
        layers: all that read it.
        largest: of the absolute values that each channel took on calibration data.
        alpha: how much of the outliers moves, 0 to 1.
    """
    module = region.submodule(norm)
    assert isinstance(module, nn.LayerNorm)
    columns = torch.stack([layer.weight.detach().abs().amax(0) for layer in layers]).amax(0)
    smallest = torch.finfo(columns.dtype).eps
    scale = largest.clamp(min=smallest) ** alpha / columns.clamp(min=smallest) ** (1 - alpha)
    scale = torch.where((largest > 0) & (columns > 0), scale, 1.0).clamp(1e-3, 1e3)
    bias = None if module.bias is None else module.bias.detach() / scale
    region.program.replace_module(
        module, rebuild(module, type(module), weight=module.weight.detach() / scale, bias=bias)
    )
    for layer in layers:
        assert layer.module is not None
        _with_weight(layer.module, layer.weight.detach() * scale, layer.module._parameters["bias"], region.program)
    count = len(layers)
    return Change(f"outliers smoothed into the {count} layers behind it", region.qualified(norm), source_of(norm))


def smoothable(region: Region) -> dict[fx.Node, list[Affine]]:
    """The layer norms whose output only linear layers read, with these."""
    found = {}
    for node in region.graph.nodes:
        if node.op != "call_module" or type(region.submodule(node)) is not nn.LayerNorm:
            continue
        module = region.submodule(node)
        if not isinstance(module, nn.LayerNorm) or module.weight is None or len(module.normalized_shape) != 1:
            continue
        readers = _beyond_quantisers(node, region)
        layers = [
            layer
            for value, reader in readers
            if (layer := _alone(reader, region)) is not None and layer.kind == "linear" and _multiplies(layer, value)
        ]
        exclusive = region.program.is_exclusive(node, module) and why_not_plain(module, nn.LayerNorm) is None
        if readers and exclusive and len(layers) == len(readers):
            found[node] = layers
    return found


def _beyond_quantisers(node: fx.Node, region: Region) -> list[tuple[fx.Node, fx.Node]]:
    """The value of `node`, or what a quantiser makes of it, with each that reads it."""
    found: list[tuple[fx.Node, fx.Node]] = []
    for user in node.users:
        quantises = user.op == "call_module" and isinstance(region.submodule(user), FakeQuantize)
        found += [(user, reader) for reader in user.users] if quantises else [(node, user)]
    return found


def _multiplies(layer: Affine, value: fx.Node) -> bool:
    """Whether all that a layer does with `value` is to multiply it: what it adds knows no scale."""
    return layer.input is value and layer.options.get("other") is not value


def _alone(node: fx.Node, region: Region) -> Affine | None:
    """A layer that nothing else calls or shares parameters with."""
    affine = read_affine(node, region)
    if not isinstance(affine, Affine) or affine.module is None:
        return None
    module = affine.module
    joined = isinstance(module, Fused) and module.bn is not None
    return affine if region.program.is_exclusive(node, module) and not joined else None


def _fit(first: Affine, second: Affine) -> bool:
    module = first.module
    if len(first.node.users) != 1 or first.is_transposed or second.is_transposed:
        return False
    if first.weight.dim() != second.weight.dim():  # a linear layer reads the last dimension, a convolution channels
        return False
    if isinstance(module, Fused):
        named = module.activation is None or module.activation.name in _SCALES_ALONG
        if module.adds or not named:
            return False
    depthwise = second.groups == second.weight.shape[0] and second.weight.shape[1] == 1
    return (second.groups == 1 or depthwise) and _inputs(second) == first.out_channels


def _inputs(affine: Affine) -> int:
    return int(affine.weight.shape[1]) * affine.groups


def _equalize(first: object, second: object, region: Region) -> None:
    assert isinstance(first, Affine) and isinstance(second, Affine)
    assert first.module is not None and second.module is not None
    one, two = first.weight.detach(), second.weight.detach()
    rows = one.flatten(1).abs().amax(1)
    columns = two.flatten(1).abs().amax(1) if second.groups > 1 else two.transpose(0, 1).flatten(1).abs().amax(1)
    scale = torch.where((rows > 0) & (columns > 0), (rows / columns.clamp(min=1e-12)).sqrt(), 1.0).clamp(1e-3, 1e3)
    ones = [1] * (two.dim() - 2)
    along = scale.reshape(-1, 1, *ones) if second.groups > 1 else scale.reshape(1, -1, *ones)
    bias = None if first.bias is None else first.bias.detach() / scale
    _with_weight(first.module, one / scale.reshape(-1, *[1] * (one.dim() - 1)), bias, region.program)
    _with_weight(second.module, two * along, second.module._parameters["bias"], region.program)


def _with_weight(module: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None, program: Program) -> None:
    given = None if bias is None else bias.detach()
    program.replace_module(module, rebuild(module, type(module), weight=weight, bias=given))
