"""A convolution or linear function together with what was fused behind it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fxopt.modules.activation import Activation


def fused_call(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    other: torch.Tensor | None = None,
    *,
    kind: str,
    activation: str,
    arguments: tuple[tuple[str, Any], ...] = (),
    **options: Any,
) -> torch.Tensor:
    """activation( kind(input, weight, bias) + other )

    What `Fused` is to layers: for parameters that the user's code hands to a function, so that they stay under
    their names. Arguments are plain values, which a graph can hold and print.

    Args:
        input: what the layer is applied to.
        weight: as `kind` takes it.
        bias: one value an output channel, or None.
        other: added before the activation, in the shape of the output; None where nothing is.
        kind: `linear`, `conv2d`, … of `torch.nn.functional`.
        activation: name of an `Activation`.
        arguments: those of the activation beside its input, by name.
        options: of `kind`: stride, padding, …
    """
    return tail(getattr(F, kind)(input, weight, bias, **options), other, Activation(activation, arguments))


def tail(out: torch.Tensor, other: torch.Tensor | None, activation: Activation | None) -> torch.Tensor:
    """activation(out + other), either of them optional, in the memory of `out`: nothing else has seen it."""
    if other is not None:
        # None of the operators before needs `out` for its gradient.
        in_place = out.shape == other.shape and out.dtype == other.dtype
        out = out.add_(other) if in_place else out + other
    return out if activation is None else activation.apply_(out)
