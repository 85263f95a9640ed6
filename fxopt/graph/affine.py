"""Reads a convolution or linear layer off a node, in whichever form it is called."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from fxopt.contract import Skip
from fxopt.graph.product import behind_mask, read_parameter
from fxopt.graph.region import Region
from fxopt.graph.source import source_of
from fxopt.modules import MASKED_FORMS, FakeQuantize, Fused, fused_call

LAYERS: Mapping[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
}
"""Convolutions and linear layers, each with the function of `torch.nn.functional` that it comes down to."""
_FUNCTIONS: dict[Any, str] = {getattr(space, kind): kind for space in (torch, F) for kind in LAYERS.values()
                              if hasattr(space, kind)}  # fmt: skip
_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_TAIL = ("kind", "activation", "arguments", "other")
_FORWARD = ("forward", "_conv_forward", "_output_padding", "__call__")


@dataclass(frozen=True)
class Affine:
    """One call of a convolution or linear layer: `y = W x + b`.

    Attributes:
        node: the call.
        kind: the function of `torch.nn.functional` that it comes down to: `conv2d`, `linear`, …
        input: what it is applied to.
        weight: the parameter.
        bias: the other one, or None.
        module: the module that is called, or None where it is a function.
        options: `stride`, `padding`, `dilation`, `groups`, `output_padding`, `padding_mode`, as far as the kind
            has them; `other` and `output_size` where the call gives them.
        weight_node: the `get_attr` node of the weight, where it is a function, or the call of its mask.
        bias_node: that of the bias.
        is_bare: whether the output is the affine map itself, with nothing fused behind it.
    """

    node: fx.Node
    kind: str
    input: fx.Node
    weight: torch.Tensor
    bias: torch.Tensor | None
    module: nn.Module | None
    options: dict[str, Any]
    weight_node: fx.Node | None = None
    bias_node: fx.Node | None = None
    is_bare: bool = True

    @property
    def is_transposed(self) -> bool:
        """Whether it is a transposed convolution, whose weight is (in, out / groups, …)."""
        return self.kind.startswith("conv_transpose")

    @property
    def groups(self) -> int:
        """Independent parts that the channels fall into."""
        return int(self.options.get("groups", 1))

    @property
    def channel_axis(self) -> int:
        """The axis of the weight that counts output channels (of one group)."""
        return 1 if self.is_transposed else 0

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return int(self.weight.shape[self.channel_axis]) * (self.groups if self.is_transposed else 1)

    def sizes(self, option: str, default: int) -> tuple[int, ...] | None:
        """An option for each spatial axis; None where it is the word `same`, as padding may be."""
        value = self.options.get(option, default)
        if value == "same":
            return None
        numbers = (0,) if value == "valid" else (value,) if isinstance(value, int) else tuple(value)
        return numbers * (self.weight.dim() - 2) if len(numbers) == 1 else numbers


def read_affine(node: fx.Node, region: Region, *, masked: bool = False) -> Affine | Skip | None:
    """The layer that `node` calls; None where it calls none, a `Skip` where it is one that must stay as it is.

    The masked weight of a function is computed, and so is refused, but where it is asked for by `masked`.
    """
    if node.op == "call_module":
        return _read_module(node, region)
    if node.op == "call_function" and (node.target in _FUNCTIONS or node.target is fused_call):
        return _read_function(node, region, masked)
    return None


def why_not_plain(module: nn.Module, base: type[nn.Module]) -> str | None:
    """What keeps `module`, a `base`, from being replaced by a `base` with other parameters; None if nothing does."""
    if parametrize.is_parametrized(module):
        names = ", ".join(repr(name) for name in module.get_submodule("parametrizations")._modules)
        return f"its parameters are parametrized: {names}"
    for kind in ("forward", "forward_pre", "backward", "backward_pre"):
        if getattr(module, f"_{kind}_hooks"):
            return f"it has a {kind.replace('_', '-')} hook, which may see or change its values"
    if type(module) in MASKED_FORMS.values() and type(module) is not base:
        return "it holds masks, which would be lost; 'sparsify-bake' writes them into its weights"
    own = Fused if isinstance(module, Fused) else base
    changed = [n for n in _FORWARD if inspect.getattr_static(type(module), n, None)
               is not inspect.getattr_static(own, n, None) and not isinstance(module, Fused)]  # fmt: skip
    if changed:
        return f"its class {type(module).__name__!r} overrides '{changed[0]}' of {base.__name__}"
    if "forward" in module.__dict__:
        return "its 'forward' is set on the instance"
    return None


def _read_module(node: fx.Node, region: Region) -> Affine | Skip | None:
    module = region.submodule(node)
    base = next((plain for plain in LAYERS if isinstance(module, plain)), None)
    if base is None:
        return None
    reason = why_not_plain(module, base)
    if reason is not None:
        return Skip(region.qualified(node), reason, source_of(node))
    names = ("input", "other", "output_size") if isinstance(module, Fused) else ("input", "output_size")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    source = given.pop("input", None)
    weight = module.weight
    if not isinstance(source, fx.Node) or not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        return Skip(region.qualified(node), "its weight is not a floating-point parameter", source_of(node))
    kept = ("stride", "padding", "dilation", "groups", "output_padding", "padding_mode")
    options = {key: getattr(module, key) for key in kept if hasattr(module, key)}
    return Affine(
        node,
        LAYERS[base],
        source,
        weight,
        cast("torch.Tensor | None", module.bias),
        module,
        {**options, **given},
        is_bare=not isinstance(module, Fused) or module.is_bare,
    )


def _read_function(node: fx.Node, region: Region, masked: bool) -> Affine | Skip | None:
    bare = node.target is not fused_call
    kind = _FUNCTIONS[node.target] if bare else str(node.kwargs["kind"])
    names = ("input", "weight", "bias") if kind == "linear" else _TRANSPOSE if "transpose" in kind else _CONV
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    source: Any = given.pop("input", None)
    weight: Any = given.pop("weight", None)
    bias: Any = given.pop("bias", None)
    if not isinstance(source, fx.Node):
        return None
    called = isinstance(weight, fx.Node) and weight.op == "call_module"
    if called and isinstance(region.submodule(weight), FakeQuantize):
        return Skip(region.qualified(node), "its weight is fake-quantised already", source_of(node))
    read = behind_mask(weight, region) if masked else weight
    values = [read_parameter(read, region), None if bias is None else read_parameter(bias, region)]
    if values[0] is None or (bias is not None and values[1] is None):
        return Skip(region.qualified(node), "its weight or bias is computed, not a parameter", source_of(node))
    options = {key: value for key, value in given.items() if key not in _TAIL}
    if any(isinstance(option, fx.Node) for option in options.values()):
        return Skip(region.qualified(node), "its options are computed", source_of(node))
    return Affine(node, kind, source, values[0], values[1], None, options, weight, bias, bare)
