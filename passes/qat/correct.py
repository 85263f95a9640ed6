"""Corrects the mean error that rounded weights and inputs leave in each channel of a layer's output.

    b' = b + E[W x] - E[Q(W) Q(x)]

The means are those over the calibration data. Layers are corrected in the order in which they run, each given what
the corrected ones before it put out. Source: Nagel et al. 2019, section 4.2, in its empirical form.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from fxopt.batches import unaffected
from fxopt.inputs import Inputs
from fxopt.modules import Fused, without_rounding

_Seen = Callable[[str, torch.Tensor], torch.Tensor]


def correct_biases(module: nn.Module, batches: Sequence[Inputs]) -> tuple[str, ...]:
    """Move the biases of all quantised layers that have one; the names of these.

    Args:
        module: calibrated, in evaluation mode.
        batches: the calibration data.
    """
    layers = {
        name: child
        for name, child in module.named_modules()
        if isinstance(child, Fused) and child.weight_fake_quant is not None and child.bn is None
    }
    layers = {name: layer for name, layer in layers.items() if layer.bias is not None}
    noted: list[dict[str, list[tuple[torch.Size, torch.Tensor]]]] = []
    moved: dict[str, list[torch.Tensor]] = defaultdict(list)

    def note(name: str, out: torch.Tensor) -> torch.Tensor:
        noted[-1][name].append((out.shape, _means(out, layers[name])))
        return out

    def move(name: str, out: torch.Tensor) -> torch.Tensor:
        wanted = noted[0][name]  # of the batch that runs
        shape, mean = wanted.pop(0) if wanted else (None, out)
        # Where values decide what runs, rounding may send other rows here, or none, or more often.
        if shape != out.shape or not (shift := mean - _means(out, layers[name])).isfinite().all():
            return out
        moved[name].append(shift)
        return out + shift.reshape(_shape(out, layers[name])).to(out.dtype)

    with torch.no_grad():
        with without_rounding(module), unaffected(module), _seen(layers, note):
            for batch in batches:
                noted.append(defaultdict(list))
                batch.map(torch.clone).call(module)
        with unaffected(module), _seen(layers, move):
            for batch in batches:
                batch.map(torch.clone).call(module)
                noted.pop(0)
        for name, shifts in moved.items():
            layer = layers[name]
            bias = layer.bias + torch.stack(shifts).mean(0).to(layer.bias.dtype)
            layer._parameters["bias"] = nn.Parameter(bias, requires_grad=layer.bias.requires_grad)
    return tuple(moved)


def _channels(out: torch.Tensor, layer: Fused) -> int:
    return out.dim() - layer.weight.dim() + 1  # a convolution's input may have no batch


def _means(out: torch.Tensor, layer: Fused) -> torch.Tensor:
    # What is a vector has no values but one for each channel.
    return out.float().movedim(_channels(out, layer), 0).unsqueeze(-1).flatten(1).mean(1)


def _shape(out: torch.Tensor, layer: Fused) -> list[int]:
    shape = [1] * out.dim()
    shape[_channels(out, layer)] = -1
    return shape


@contextmanager
def _seen(layers: dict[str, Fused], see: _Seen) -> Iterator[None]:
    """Let `see` have, and replace, what each layer computes before anything is added or activated."""

    def wrapped(name: str, affine: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args: see(name, affine(*args))

    for name, layer in layers.items():
        layer.__dict__["_affine"] = wrapped(name, layer._affine)
    try:
        yield
    finally:
        for layer in layers.values():
            del layer.__dict__["_affine"]
