"""How far one tensor is from another, and how far it may be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

TOLERANCE: Mapping[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
    torch.complex128: 1e-9,
    torch.complex64: 1e-4,
    torch.complex32: 1e-2,
}
"""Relative error that `Promise.CLOSE` allows, by the dtype of the output, or the narrowest that it is computed in."""
_PIECE = 1 << 18
"""Elements of an output that are compared at a time: 2 MiB in float64."""
_FILL = 1e8
"""From here on, or from half the largest number of its dtype, a value may be what a mask is filled with..."""
_FILL_GAP = 100.0
"""... if all others are smaller by this factor."""
_FILL_SPREAD = 16.0
"""How far values of one such fill lie apart: it may have been added to scores, or twice."""

_ROUNDING_ALONE = 1e-2
"""An output that is farther from its float64 run took another branch, drew other numbers, or chose another item."""


def relative_error(expected: torch.Tensor, found: torch.Tensor) -> float:
    """`max |found - expected| / max |expected|`; infinite where shapes, NaN or infinity differ, 0 for equal or empty.

    Where the largest values are what a mask was filled with, they and the others are each held to their own scale,
    and the larger error counts.

    Of whole numbers and booleans it is the share that differs, where that is less: they are chosen, as by argmax, and
    where two values are as good as equal, their rounding decides which.
    """
    expected, found = _plain(expected), _plain(found)
    if expected.shape != found.shape:
        return float("inf")
    if torch.equal(expected, found) or expected.numel() == 0:
        return 0.0
    if expected.is_floating_point() or expected.is_complex():
        return _by_scale(expected, found)
    return min(share_of_others(expected, found), _by_scale(expected, found))


def apart_by_rounding(reference: torch.Tensor, rounded: torch.Tensor) -> float:
    """How far another rounding of an output may be from this one, by the float64 run that both are roundings of.

    One may be closer to it by chance: of models that multiply rounding, what torch gives in other layouts and without
    oneDNN is up to 5 times as far from its own output as that is from float64.
    """
    own = relative_error(reference, rounded)
    return max(2 * own, min(6 * own, _ROUNDING_ALONE)) if own <= _ROUNDING_ALONE else 0.0


def share_of_others(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The share of the values that are not equal, of two tensors of one shape; 0 for empty ones."""
    others = _plain(expected) != _plain(found)
    return others.double().mean().item() if others.numel() else 0.0


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """Its values, dense and not quantised."""
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return dense.dequantize() if dense.is_quantized else dense


def _by_scale(expected: torch.Tensor, found: torch.Tensor) -> float:
    scale = worst = 0.0
    for pair in _pieces(expected, found):
        if pair is None:
            return float("inf")
        ours, theirs = pair
        scale = max(scale, ours.abs().max().item())
        worst = max(worst, (theirs - ours).abs().max().item())
    largest = torch.finfo(found.dtype).max if found.is_floating_point() else math.inf
    if scale < min(_FILL, largest / 2):
        return worst / scale if scale else (0.0 if worst == 0 else float("inf"))
    rest_scale = rest_worst = fill_worst = 0.0
    for pair in _pieces(expected, found):
        assert pair is not None
        ours, theirs = pair
        error, rest = (theirs - ours).abs(), ours.abs() < scale / _FILL_SPREAD
        rest_scale = max(rest_scale, ours.masked_fill(~rest, 0).abs().max().item())
        rest_worst = max(rest_worst, error.masked_fill(~rest, 0).max().item())
        fill_worst = max(fill_worst, error.masked_fill(rest, 0).max().item())
    if not 0 < rest_scale < scale / _FILL_GAP:
        return worst / scale
    return max(fill_worst / scale, rest_worst / rest_scale)


def _pieces(expected: torch.Tensor, found: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor] | None]:
    """Both in wide numbers, with 0 for what is not finite; None where they differ in that.

    In pieces, since the outputs of a language model, as wide as this, take gigabytes.
    """
    wide = torch.complex128 if expected.is_complex() else torch.float64
    bounds = torch.finfo(found.dtype) if found.is_floating_point() else None
    for ours, theirs in zip(expected.reshape(-1).split(_PIECE), found.reshape(-1).split(_PIECE), strict=True):
        ours, theirs = ours.to(wide), theirs.to(wide)
        odd = ~torch.isfinite(ours)
        if not torch.equal(odd, ~torch.isfinite(theirs)) or not torch.equal(
            ours[odd].nan_to_num(), theirs[odd].nan_to_num()
        ):
            yield None
            return
        ours, theirs = ours.masked_fill(odd, 0), theirs.masked_fill(odd, 0)
        # A mask that is filled with the smallest number of its dtype has a smaller one in a float64 run.
        yield (ours.clamp(bounds.min, bounds.max) if bounds is not None else ours), theirs
