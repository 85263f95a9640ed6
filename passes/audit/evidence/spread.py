"""How the numbers of a tensor are spread."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# How near to its ends a bounded activation is flat: its gradient is 500 times below the largest there.
_ENDS = {"sigmoid": (0.0, 1.0, 5e-4), "tanh": (-1.0, 1.0, 1e-3), "softmax": (0.0, 1.0, 1e-3)}


@dataclass(frozen=True)
class Spread:
    """Of all elements of the tensors that one module, or one line, returned.

    Attributes:
        count: how many elements.
        mean: of them.
        variance: of them, around that mean.
        zeros: share of those that are 0.
        low: the smallest.
        high: the largest.
        between: the variance along the first dimension alone, on average: what tells samples apart. NaN for one.
    """

    count: int
    mean: float
    variance: float
    zeros: float
    low: float
    high: float
    between: float

    @property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(abs(self.low), abs(self.high))

    def joined(self, other: Spread) -> Spread:
        """That of both together."""
        count = self.count + other.count
        one, two = self.count / count, other.count / count
        mean = one * self.mean + two * other.mean
        square = one * (self.variance + self.mean**2) + two * (other.variance + other.mean**2)
        zeros = one * self.zeros + two * other.zeros
        low, high = min(self.low, other.low), max(self.high, other.high)
        between = one * self.between + two * other.between
        return Spread(count, mean, max(0.0, square - mean**2), zeros, low, high, between)


def spread(tensor: torch.Tensor) -> Spread | None:
    """Measure; None where there are no numbers."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta or tensor.layout is not torch.strided:
        return None
    values = tensor.detach()
    values = values if values.dtype in (torch.float32, torch.float64) else values.float()
    variance, mean = torch.var_mean(values, correction=0)
    low, high = values.aminmax()
    several = values.dim() > 1 and values.shape[0] > 1
    between = values.var(0, correction=0).mean() if several else torch.tensor(torch.nan)
    zeros = 1 - int(values.count_nonzero()) / values.numel()
    return Spread(values.numel(), float(mean), float(variance), zeros, float(low), float(high), float(between))


def flat(name: str, result: torch.Tensor, dimension: int = -1) -> float:
    """The share of elements where an activation has next to no gradient; of a softmax, of rows along `dimension`."""
    low, high, margin = _ENDS[name]
    if name == "softmax":
        several = result.dim() and result.shape[dimension] > 1
        return float((result.amax(dimension) > high - margin).float().mean()) if several else 0.0
    return float(((result < low + margin) | (result > high - margin)).float().mean())
