"""Which sizes depend on values: no decision can be recorded on those, and on all others it is a guard."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxopt.capture import capture


class Decides(nn.Module):
    """Decides on the size of what a function makes of two inputs."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, other):
        result = self.function(x, other)
        return result * 2 if result.shape[0] > 3 else result


X, ROWS, MASK = torch.randn(4, 4), torch.tensor([0, 2, 1, 1]), torch.tensor([True, False, True, True])


@pytest.mark.parametrize(
    ("function", "other", "by_values"),
    [
        (lambda x, other: x.repeat_interleave(2, dim=0), ROWS, False),
        (lambda x, other: torch.repeat_interleave(x, 2, 0), ROWS, False),
        (lambda x, other: x.repeat_interleave(other, dim=0), ROWS, True),
        (lambda x, other: torch.repeat_interleave(x, repeats=other, dim=0), ROWS, True),
        (lambda x, other: torch.repeat_interleave(other), ROWS, True),
        (lambda x, other: x.tensor_split(2)[0], ROWS, False),
        (lambda x, other: other[torch.arange(4)], MASK, False),
        (lambda x, other: x[other], MASK, True),
        (lambda x, other: x[other], ROWS, False),
        (lambda x, other: x[0, other], MASK, True),
    ],
)
def test_sizes_by_values(function, other, by_values):
    captured = capture(Decides(function), (X, other))
    assert bool(captured.opaque) is by_values
    assert bool(captured.guards) is not by_values
    assert torch.equal(captured.module(X, other), Decides(function)(X, other))
