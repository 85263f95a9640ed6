"""Other values for the parameters of a layer: scaled, shifted, put in place."""

from __future__ import annotations

import torch

from fxopt.graph.affine import Affine
from fxopt.graph.region import Region
from fxopt.modules import Fused, rebuild


def scale_by_output(scale: torch.Tensor, affine: Affine) -> torch.Tensor:
    """`scale`, one value an output channel, in a shape that multiplies the weight."""
    ones = [1] * (affine.weight.dim() - 2)
    if not affine.is_transposed:
        return scale.reshape(-1, 1, *ones)
    by_group = scale.reshape(affine.groups, 1, -1).expand(-1, affine.weight.shape[0] // affine.groups, -1)
    return by_group.reshape(*affine.weight.shape[:2], *ones)


def scale_by_input(scale: torch.Tensor, affine: Affine) -> torch.Tensor:
    """`scale`, one value an input channel, in a shape that multiplies the weight."""
    ones = [1] * (affine.weight.dim() - 2)
    if affine.is_transposed:
        return scale.reshape(-1, 1, *ones)
    outputs, inputs = affine.weight.shape[:2]
    by_group = scale.reshape(affine.groups, 1, inputs).expand(-1, outputs // affine.groups, -1)
    return by_group.reshape(outputs, inputs, *ones)


def shift_behind(shift: torch.Tensor, affine: Affine) -> torch.Tensor:
    """What adding `shift`, one value an input channel, to the input of a layer adds to its output."""
    moved = affine.weight.detach().double() * scale_by_input(shift, affine)
    moved = moved.flatten(2).sum(2) if moved.dim() > 2 else moved
    if affine.is_transposed:  # (in, out / groups): the inputs of each group add up
        moved = moved.reshape(affine.groups, -1, moved.shape[1])
    return moved.sum(1).flatten()


def why_shift_stays(affine: Affine, shift: torch.Tensor) -> str | None:
    """Why what is added to the input of a layer is no constant at its output; None if it is one."""
    if not shift.any() or affine.kind == "linear":
        return None
    point = all(size == 1 for size in affine.weight.shape[2:])
    if affine.is_transposed:
        defaults = {"stride": 1, "padding": 0, "output_padding": 0}
        plain = all({*(affine.sizes(key, default) or ())} == {default} for key, default in defaults.items())
        return None if point and plain else "each output of a transposed convolution sums other taps of its shift"
    padding = affine.sizes("padding", 0)
    pads = not point if padding is None else any(padding)
    if pads and affine.options.get("padding_mode", "zeros") == "zeros":
        return "the convolution pads with zeros behind it: its shift does not reach the border"
    return None


def replace_values(affine: Affine, weight: torch.Tensor, bias: torch.Tensor | None, region: Region) -> str | None:
    """Put new values in the place of a layer's parameters, or say why they can't be; without bias, it keeps its own."""
    dtype, module = affine.weight.dtype, affine.module
    new, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
    given = (new,) if offset is None else (new, offset)
    if not all(bound.isfinite() for tensor in given for bound in torch.aminmax(tensor)):
        return f"the folded values do not fit {str(dtype).removeprefix('torch.')}"
    if isinstance(module, Fused) and module.weight_fake_quant is not None:
        return "the weight of the layer is fake-quantised already"
    if module is not None:
        named = {"weight": new} if offset is None else {"weight": new, "bias": offset}
        region.program.replace_module(module, rebuild(module, type(module), **named))
        return None
    assert affine.weight_node is not None
    name = str(affine.weight_node.target)
    trains = affine.weight.requires_grad
    region.swap_parameter(affine.weight_node, new)
    if offset is None:
        return None
    if affine.bias_node is not None:
        region.swap_parameter(affine.bias_node, offset)
        return None
    owner, _, _ = name.rpartition(".")
    added = region.insert_attribute(
        affine.node, region.add_parameter(f"{owner}.bias" if owner else "bias", offset, trainable=trains)
    )
    if len(affine.node.args) > 2:
        affine.node.update_arg(2, added)
    else:
        affine.node.update_kwarg("bias", added)
    return None
