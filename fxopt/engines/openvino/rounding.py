"""Weights rounded to bfloat16 so that the mean of no channel moves.

OpenVINO rounds each weight and bias to the nearest. What an activation hands on is seldom zero in the mean, so the
errors of a channel's weights add up to one that is much the same for all inputs. Here a few weights that lie between
two values go to the farther one, and it is gone. So does the bias correction of "Data-Free Quantization Through Weight
Equalization and Bias Correction" (Nagel et al., 2019), section 4.2, but a corrected bias would be rounded again.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch

LAYERS = frozenset({"Convolution", "GroupConvolution", "MatMul"})
_NEAR_THE_MIDDLE = 0.25
"""Weights at least this far from the nearest value, as a share of the step to the other one, may go there."""


def constant_behind(value: Any) -> Any | None:
    """The constant that a value is, which may be reshaped; None where it is computed."""
    source = value.get_node()
    if source.get_type_name() == "Reshape":
        source = source.input_value(0).get_node()
    return source if source.get_type_name() == "Constant" else None


def add_means(model: Any) -> list[str]:
    """Let a model give, behind its own outputs, the mean of each channel that a layer with a weight reads.

    Returns:
        The names of the layers, in the order of these outputs.
    """
    from openvino import opset13

    names, results = [], []
    for layer in model.get_ordered_ops():
        rank = layer.input_value(0).get_partial_shape().rank if _weight(layer) is not None else None
        if rank is None or rank.is_dynamic:
            continue
        channels = rank.get_length() - 1 if layer.get_type_name() == "MatMul" else 1
        others = np.array([axis for axis in range(rank.get_length()) if axis != channels])
        names.append(layer.get_friendly_name())
        results.append(opset13.result(opset13.reduce_mean(layer.input_value(0), others, keep_dims=False)))
    model.add_results(results)
    return names


def rounded_weights(
    model: Any, means: Mapping[str, torch.Tensor], names: Collection[str]
) -> Mapping[str, torch.Tensor]:
    """The weights of some layers in bfloat16, by name; `means` has, for each, what `add_means` lets a model give."""
    found = {}
    for layer in model.get_ordered_ops():
        name = layer.get_friendly_name()
        weight = _weight(layer) if name in names else None
        if weight is None:
            continue
        swapped = layer.get_type_name() == "MatMul" and not layer.get_attributes()["transpose_b"]
        own = weight.T if swapped else weight
        # Outputs x inputs x taps; by groups, each output of a group reads the inputs of this group.
        grouped = layer.get_type_name() == "GroupConvolution"
        groups, rows = (own.shape[0], own.flatten(0, 1)) if grouped else (1, own)
        read = means[name].reshape(groups, 1, -1).expand(-1, rows.shape[0] // groups, -1).flatten(0, 1)
        taps = rows.flatten(2) if rows.dim() > 2 else rows.unsqueeze(2)
        rounded = _rounded(taps, read.unsqueeze(2), _lost_bias(layer, rows.shape[0])).reshape(own.shape)
        found[name] = (rounded.T if swapped else rounded).contiguous()
    return found


def put_weights(model: Any, weights: Mapping[str, torch.Tensor]) -> None:
    """Let layers, by name, multiply by these weights in place of their own."""
    from openvino import opset13

    for layer in model.get_ordered_ops():
        weight = weights.get(layer.get_friendly_name())
        if weight is not None:
            layer.input(1).replace_source_output(opset13.constant(weight.float().numpy()).output(0))


def _rounded(weight: torch.Tensor, means: torch.Tensor, lost: torch.Tensor) -> torch.Tensor:
    """Values of bfloat16 for a weight of outputs x inputs x taps.

    Args:
        weight: in float32.
        means: of what each is multiplied by; outputs x inputs x 1.
        lost: of each output otherwise, to be made up for.
    """
    nearest = weight.bfloat16()
    error = weight - nearest.float()
    other = torch.nextafter(nearest, torch.where(error > 0, torch.inf, -torch.inf).bfloat16()).float()
    step = other - nearest.float()
    lost = lost + (error * means).sum((1, 2))
    gain = (step * means).flatten(1)
    helps = (gain * lost.unsqueeze(1) > 0) & (error / step >= _NEAR_THE_MIDDLE).flatten(1)
    gained = (gain * helps).cumsum(1)
    # As many of them, from the first on, as come closest to what is lost; none where the first is too much already.
    left = (lost.unsqueeze(1) - gained).abs()
    best, count = left.min(1)
    last = torch.where(best < lost.abs(), count, -1)
    goes = (helps & (torch.arange(gain.shape[1]) <= last.unsqueeze(1))).view_as(weight)
    return torch.where(goes, other, nearest.float()).bfloat16()


def _lost_bias(layer: Any, outputs: int) -> torch.Tensor:
    """What rounding its bias takes from each output of a layer."""
    for reader in layer.output(0).get_target_inputs():
        add = reader.get_node()
        if add.get_type_name() == "Add":
            bias = _constant(add.input_value(1 - reader.get_index()))
            if bias is not None and bias.numel() == outputs:
                return (bias - bias.bfloat16().float()).flatten()
    return torch.zeros(outputs)


def _weight(layer: Any) -> torch.Tensor | None:
    """The constant that a layer multiplies its input by: that of a linear layer is a matrix."""
    if layer.get_type_name() not in LAYERS:
        return None
    weight = _constant(layer.input_value(1))
    if weight is None or layer.get_type_name() != "MatMul":
        return weight
    return weight if weight.dim() == 2 and not layer.get_attributes()["transpose_a"] else None


def _constant(value: Any) -> torch.Tensor | None:
    """A constant in float32, which may be reshaped."""
    source = constant_behind(value)
    if source is None or value.get_element_type().to_string() != "f32":
        return None
    return torch.from_numpy(np.array(source.data)).reshape(tuple(value.get_shape()))
