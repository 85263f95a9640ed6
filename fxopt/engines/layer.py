"""Reads off a graph the layers that engines have kernels for, with what follows them."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.contract import Skip
from fxopt.graph import Affine, Region, is_written, read_affine, read_parameter, read_product, source_of
from fxopt.graph.effects import ADDS, ADDS_INTO, Effects
from fxopt.modules import Activation, Fused, fused_call

Supported = Callable[[torch.dtype], "str | None"]
"""Why there are no kernels for a dtype; None where there are."""


@dataclass(frozen=True, eq=False)
class Layer:
    """activation( op(x) + other ), at one place of a graph.

    Attributes:
        node: the call of the operator.
        last: the node whose value it computes: `node`, or what follows and is computed with it.
        input: what the operator is applied to.
        other: what is added, or None.
        reuses: whether the memory of `other` may hold the result: nothing else sees it, nor does the operator read it.
        kind: "linear", "conv" or "conv_transpose".
        shape: of the input of the example.
        weight, bias: the parameters.
        stride, padding, dilation, output_padding: one number a spatial dimension.
        groups: independent parts that the channels fall into.
        activation: what comes last, or None.
    """

    node: fx.Node
    last: fx.Node
    input: fx.Node
    other: fx.Node | None
    reuses: bool
    kind: str
    shape: torch.Size
    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    groups: int = 1
    activation: Activation | None = None

    @property
    def spatial(self) -> int:
        """How many spatial dimensions it has; 0 for linear."""
        return 0 if self.kind == "linear" else len(self.shape) - 2

    @property
    def is_pointwise(self) -> bool:
        """Whether it is a matrix product over the channels of each place: linear, or a 1x1 convolution."""
        if self.kind == "linear":
            return True
        ones = all(size == 1 for size in self.weight.shape[2:]) and not any(self.padding)
        return self.kind == "conv" and ones and self.groups == 1 and self.spatial == 2

    def gives_the_shape_of(self, other: torch.Tensor, x: torch.Tensor) -> bool:
        """Whether the output for `x`, of a linear layer or a convolution, has the shape of `other`.

        What is added may be broadcast for some batch sizes only, which fused operators do not do.
        """
        outputs = self.weight.shape[0]
        if self.kind == "linear":
            return other.shape == (*x.shape[:-1], outputs)
        geometry = zip(x.shape[2:], self.weight.shape[2:], self.stride, self.padding, self.dilation, strict=True)
        sizes = [(size + 2 * pad - step * (taps - 1) - 1) // stride + 1 for size, taps, stride, pad, step in geometry]
        return other.shape == (x.shape[0], outputs, *sizes)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What its speed depends on."""
        tail = (self.activation, self.other is not None, self.reuses)
        geometry = (self.stride, self.padding, self.dilation, self.output_padding, self.groups)
        weight = (tuple(self.weight.shape), self.weight.dtype, self.bias is None)
        return (self.kind, tuple(self.shape), *weight, *geometry, *tail)


def read_layer(node: fx.Node, region: Region, supported: Supported, taken: Set[fx.Node]) -> Layer | Skip | None:
    """The layer that begins at a node; None where none does, a `Skip` where no kernel can take it.

    What is in `taken` belongs to another layer and is not computed with this one.
    """
    affine = read_affine(node, region) or _read_sum(node, region)
    if affine is None or isinstance(affine, Skip):
        return affine
    meta = affine.input.meta.get("tensor_meta")
    reason = _why_not(affine, meta, supported)
    if any(is_written(each, region.program) for each in (affine.weight, affine.bias) if each is not None):
        reason = "the graph writes into its parameters"
    if meta is None or reason is not None:
        return Skip(region.qualified(node), reason or "", source_of(node))
    activation, other = _tail(affine)
    layer = Layer(
        node=node,
        last=node,
        input=affine.input,
        other=other,
        reuses=other is not None and other is not affine.input and Effects(region).is_fresh(other),
        kind=affine.kind.rstrip("123d"),
        shape=meta.shape,
        weight=(affine.module.masked_weight() if isinstance(affine.module, Fused) else affine.weight).detach(),
        bias=None if affine.bias is None else affine.bias.detach().contiguous(),  # kernels take its stride for 1
        **_geometry(affine),
        groups=affine.groups,
        activation=activation,
    )
    user = _only_user(node)
    if layer.activation or layer.other or user is None or user in taken:
        return layer
    if Effects(region).written_between(layer.input, node, user):  # it would be read at the place of `user`
        return layer
    follows = (_with_bias, _with_addition, _with_hardsigmoid)
    return next(filter(None, (found(layer, user, region) for found in follows)), layer)


def _read_sum(node: fx.Node, region: Region) -> Affine | Skip | None:
    """x W + b of matrices, as GPT-2's layers call it, as the linear layer of W^T."""
    product = read_product(node, region)
    if product is None or product.kind != "matmul":
        return None
    weight, bias = product.weight.detach().t(), read_parameter(product.bias_node, region)
    if len(node.args) == 3 and (bias is None or bias.shape != weight.shape[:1]):
        return Skip(region.qualified(node), "what it adds is not a parameter with a number an output", source_of(node))
    return Affine(node, "linear", product.input, weight, bias, None, {}, product.weight_node, product.bias_node)


def _why_not(affine: Affine, meta: Any, supported: Supported) -> str | None:
    weight, options = affine.weight, affine.options
    if meta is None:
        return "the example never reaches it"
    reason = supported(weight.dtype)
    if reason is not None:
        return reason
    if meta.dtype is not weight.dtype:
        return f"its input is {meta.dtype}, its weight {weight.dtype}"
    made = affine.node.meta.get("tensor_meta")
    if made is not None and made.dtype is not weight.dtype:  # by autocast, which kernels know nothing of
        return f"its output is {made.dtype}, its weight {weight.dtype}"
    if made is not None and made.requires_grad:  # within `torch.enable_grad()`; kernels have no backward
        return "the forward computes gradients through it"
    if isinstance(affine.module, Fused) and (affine.module.bn or affine.module.weight_fake_quant):
        return "it holds a batch norm or a fake quantiser"
    if weight.numel() == 0 or weight.layout is not torch.strided:
        return "its weight is empty or not dense"
    if affine.kind == "linear":
        return "its input has one dimension" if len(meta.shape) < 2 else None
    if len(meta.shape) != weight.dim():
        return "its input has no batch dimension"
    if options.get("padding_mode", "zeros") != "zeros":
        return f"it pads by {options['padding_mode']!r}"
    if options.get("output_size") is not None:
        return "it is called with an output size"
    if options.get("padding") == "same" and any(total % 2 for total in _same_padding(affine)):
        return "its padding is not the same on both sides"
    if affine.kind == "conv_transpose1d":
        return "there is no kernel for one-dimensional transposed convolutions"
    return None


def _geometry(affine: Affine) -> dict[str, tuple[int, ...]]:
    defaults = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0}
    sizes = {name: affine.sizes(name, default) for name, default in defaults.items()}
    same = tuple(total // 2 for total in _same_padding(affine))
    return {name: same if each is None else each for name, each in sizes.items()}


def _same_padding(affine: Affine) -> list[int]:
    steps = affine.sizes("dilation", 1) or ()
    return [(size - 1) * step for size, step in zip(affine.weight.shape[2:], steps, strict=True)]


def _tail(affine: Affine) -> tuple[Activation | None, fx.Node | None]:
    if isinstance(affine.module, Fused):
        return affine.module.activation, affine.options.get("other")
    if affine.node.target is fused_call:
        given = affine.node.kwargs
        other = given.get("other", affine.node.args[3] if len(affine.node.args) > 3 else None)
        return Activation(str(given["activation"]), given.get("arguments", ())), other  # type: ignore[arg-type, return-value]
    return None, None


def _with_bias(layer: Layer, user: fx.Node, region: Region) -> Layer | None:
    """With the addition behind it of a parameter that has a number for each output: x W + b of matrices."""
    operands = [*user.args, *user.kwargs.values()]
    if user.target not in ADDS or user.op == "call_module" or len(operands) != 2:
        return None
    bias = read_parameter(operands[1] if operands[0] is layer.node else operands[0], region)
    if layer.kind != "linear" or layer.bias is not None or bias is None or is_written(bias, region.program):
        return None
    if bias.shape != layer.weight.shape[:1] or bias.dtype is not layer.weight.dtype:
        return None
    return replace(layer, last=user, bias=bias.detach().contiguous())


def _with_addition(layer: Layer, user: fx.Node, region: Region) -> Layer | None:
    """With the addition behind it, where one follows that may come later than the layer."""
    operands = [*user.args, *user.kwargs.values()]
    if user.target not in ADDS or user.op == "call_module" or len(operands) != 2 or operands[0] is operands[1]:
        return None
    other = operands[1] if operands[0] is layer.node else operands[0]
    if not isinstance(other, fx.Node):
        return None
    metas = [node.meta.get("tensor_meta") for node in (layer.node, other, user)]
    if None in metas or len({(meta.shape, meta.dtype) for meta in metas}) != 1:  # type: ignore[union-attr]
        return None
    fresh = Effects(region).is_fresh(other)
    writes_other = user.target in ADDS_INTO and user.args[0] is other
    if writes_other and not fresh:
        return None
    return replace(layer, last=user, other=other, reuses=fresh)


def _with_hardsigmoid(layer: Layer, user: fx.Node, region: Region) -> Layer | None:
    called = user.op == "call_module" and type(region.submodule(user)) is nn.Hardsigmoid
    if called or user.target is F.hardsigmoid:
        return replace(layer, last=user, activation=Activation("hardsigmoid"))
    return None


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op.startswith("call_") else None
