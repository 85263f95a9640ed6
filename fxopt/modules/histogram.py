"""Ranges for integers, chosen from a histogram of what was observed.

A histogram is a vector of counts over equal bins between a lowest and a highest value. All choices hold 0.0.
"""

from __future__ import annotations

import torch

BINS = 2048
_CANDIDATES = 48


def widened(
    counts: torch.Tensor, low: torch.Tensor, high: torch.Tensor, new_low: torch.Tensor, new_high: torch.Tensor
) -> torch.Tensor:
    """The counts between `low` and `high` as counts over the wider range: each bin goes where its middle lies."""
    middles = _middles(low, high, len(counts))
    width = (new_high - new_low).clamp(min=torch.finfo(counts.dtype).tiny)
    places = ((middles - new_low) / width * len(counts)).long().clamp(0, len(counts) - 1)
    return torch.zeros_like(counts).index_add_(0, places, counts)


def counted(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """How many of the values fall into each bin."""
    width = (high - low).clamp(min=torch.finfo(values.dtype).tiny)
    places = ((values.flatten() - low) / width * BINS).long().clamp(0, BINS - 1)
    return torch.bincount(places, minlength=BINS).to(values.dtype)


def percentile_range(
    counts: torch.Tensor, low: torch.Tensor, high: torch.Tensor, share: float = 0.9999
) -> tuple[torch.Tensor, torch.Tensor]:
    """The range that leaves out (1 - share) / 2 of the values at each end."""
    total = counts.cumsum(0) / counts.sum()
    edges = torch.linspace(0, 1, len(counts) + 1, device=counts.device)
    first = int((total < (1 - share) / 2).sum())
    last = int((total < (1 + share) / 2).sum())
    width = high - low
    return low + width * edges[first], low + width * edges[min(last + 1, len(counts))]


def least_squares_range(
    counts: torch.Tensor, low: torch.Tensor, high: torch.Tensor, steps: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The range with the least squared error of rounding and clipping, either end searched by itself.

    Args:
        steps: that the integer has between its lowest and its highest value.
        symmetric: whether the range will be extended to be so.
    """
    middles = _middles(low, high, len(counts))
    shares = torch.linspace(1.0, 1.0 / _CANDIDATES, _CANDIDATES, device=counts.device)
    best_low, best_high = low.clamp(max=0), high.clamp(min=0)
    lows, highs = shares * best_low, shares * best_high
    for _ in range(2):  # the ends hardly depend on each other
        best_low = lows[_errors(middles, counts, lows, best_high, steps, symmetric).argmin()]
        best_high = highs[_errors(middles, counts, best_low, highs, steps, symmetric).argmin()]
    return best_low, best_high


def least_divergence_range(
    counts: torch.Tensor, low: torch.Tensor, high: torch.Tensor, steps: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The range whose rounded distribution diverges least from that of the values (Migacz 2017).

    Both ends shrink by the same factor. What is clipped counts at the ends. Of values that are nearly all small and
    for a few that matter, as those of a softmax, this alone would clip the few: so no range is taken whose squared
    error is larger than that of the whole one.
    """
    middles = _middles(low, high, len(counts))
    shares = torch.linspace(1.0, 0.1, _CANDIDATES, device=counts.device)
    errors = _errors(middles, counts, shares * low.clamp(max=0), shares * high.clamp(min=0), steps, symmetric)
    best, least = 1.0, float("inf")
    for candidate in shares[errors <= errors[0]].tolist():
        inside = (middles >= low * candidate) & (middles <= high * candidate)
        if int(inside.sum()) < 2:
            continue
        clipped = counts[inside].clone()
        index = inside.nonzero().flatten()
        clipped[0] += counts[: int(index[0])].sum()
        clipped[-1] += counts[int(index[-1]) + 1 :].sum()
        divergence = _divergence(clipped, counts[inside], steps + 1)
        if divergence < least:
            best, least = candidate, divergence
    return low * best, high * best


def _middles(low: torch.Tensor, high: torch.Tensor, bins: int) -> torch.Tensor:
    return low + (high - low) * (torch.arange(bins, device=low.device) + 0.5) / bins


def _errors(
    values: torch.Tensor, weights: torch.Tensor, lows: torch.Tensor, highs: torch.Tensor, steps: int, symmetric: bool
) -> torch.Tensor:
    """The squared error of rounding and clipping by each of some ranges."""
    if symmetric:
        highs = torch.maximum(-lows, highs)
        lows = -highs
    scales = ((highs - lows) / steps).clamp(min=torch.finfo(values.dtype).eps)[..., None]
    offsets = (lows[..., None] / scales).round()
    rounded = ((values / scales).round().clamp(offsets, offsets + steps)) * scales
    return ((rounded - values).square() * weights).sum(1)


def _divergence(reference: torch.Tensor, counts: torch.Tensor, levels: int) -> float:
    """Kullback-Leibler divergence of the reference from the same counts told apart by so many levels only."""
    places = (torch.arange(len(counts), device=counts.device) * levels) // len(counts)
    sums = torch.zeros(levels, device=counts.device).index_add_(0, places, counts)
    filled = torch.zeros(levels, device=counts.device).index_add_(0, places, (counts > 0).to(counts.dtype))
    spread = torch.where(counts > 0, (sums / filled.clamp(min=1))[places], 0.0)
    p, q = reference / reference.sum(), spread / spread.sum().clamp(min=1e-12)
    known = p > 0
    return float((p[known] * (p[known] / q[known].clamp(min=1e-9)).log()).sum())
