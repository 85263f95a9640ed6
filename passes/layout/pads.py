"""conv(pad(x))  =>  conv'(x), where zeros are added, as many on either side."""

from __future__ import annotations

from typing import Any

import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.contract import Change, Skip
from fxopt.graph import Affine, Effects, Region, read_affine, source_of, why_called_elsewhere, why_not_plain
from fxopt.modules import rebuild

_MODULES = (
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d,
)  # fmt: skip


def fold_pad(node: fx.Node, region: Region) -> Change | Skip | None:
    """Fold the pad that `node` computes into the convolutions that alone use it."""
    pad = _zeros(node, region)
    users = [read_affine(user, region) for user in node.users]
    if pad is None or not users or any(user is None for user in users):
        return None
    where, line = region.qualified(node), source_of(node)
    convolutions = [user for user in users if isinstance(user, Affine)]
    stays = next((user for user in users if isinstance(user, Skip)), None)
    if stays is not None:
        return Skip(where, f"'{stays.where}' stays as it is: {stays.reason}", line)
    source = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(source, fx.Node)
    for conv in convolutions:
        reason = _why_not(conv, pad, region)
        writer = Effects(region).written_between(source, node, conv.node)
        if writer is not None:
            reason = f"its input is written in place by '{region.qualified(writer)}' before it is used"
        if reason is not None:
            return Skip(where, reason, line)
    names = ", ".join(f"'{region.qualified(conv.node)}'" for conv in convolutions)
    for conv in convolutions:
        region.absorb(node, conv.node)
        _widen(conv, pad, region)
        conv.node.replace_input_with(node, source)
    region.graph.erase_node(node)
    return Change(f"folded into the padding of {names}", where, line)


def _zeros(node: fx.Node, region: Region) -> tuple[int, ...] | None:
    """The sizes by which a call pads with zeros, from the last axis on."""
    if node.op == "call_module":
        module = region.submodule(node)
        base = next((kind for kind in _MODULES if isinstance(module, kind)), None)
        if base is None or why_not_plain(module, base) is not None or getattr(module, "value", 0) != 0:
            return None
        pad: Any = module.padding
    elif node.op == "call_function" and node.target in (F.pad, _PAD):
        given = {**dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)), **node.kwargs}
        if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0, 0.0):
            return None
        pad = given["pad"]
    else:
        return None
    whole = isinstance(pad, (tuple, list)) and all(isinstance(size, int) for size in pad)
    return tuple(pad) if whole else None


_PAD = getattr(F.pad, "__wrapped__", F.pad)


def _why_not(conv: Affine, pad: tuple[int, ...], region: Region) -> str | None:
    spatial = conv.weight.dim() - 2
    if conv.kind == "linear" or conv.is_transposed:
        return f"'{region.qualified(conv.node)}' has no padding of this kind"
    if any(pad[2 * spatial :]) or len(pad) % 2:
        return "it pads channels or samples"
    if any(left != right for left, right in zip(pad[::2], pad[1::2], strict=True)):
        return f"it pads by {pad}; a convolution pads as much on either side"
    if any(size < 0 for size in pad):
        return f"it pads by {pad}: it crops"
    if conv.options.get("padding_mode", "zeros") != "zeros":
        return f"'{region.qualified(conv.node)}' pads by {conv.options['padding_mode']} itself"
    if conv.options.get("padding", 0) == "same":
        return f"the padding of '{region.qualified(conv.node)}' is 'same'"
    return why_called_elsewhere(conv, region, [conv.node])


def _widen(conv: Affine, pad: tuple[int, ...], region: Region) -> None:
    spatial = conv.weight.dim() - 2
    more = [*pad[::2], *[0] * spatial][:spatial][::-1]
    padding = tuple(a + b for a, b in zip(conv.sizes("padding", 0) or (), more, strict=True))
    if conv.module is None:
        position = 4
        if len(conv.node.args) > position:
            conv.node.update_arg(position, padding)
        else:
            conv.node.update_kwarg("padding", padding)
        return
    made = rebuild(conv.module, type(conv.module))
    made.padding = padding  # type: ignore[assignment]
    made._reversed_padding_repeated_twice = [size for size in padding[::-1] for _ in range(2)]  # type: ignore[assignment]
    region.program.replace_module(conv.module, made)
