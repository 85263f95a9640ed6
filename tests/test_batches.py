"""Whoever runs a module on calibration data leaves no trace: neither in the data nor in the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import PassError
from fxopt.inputs import Inputs
from passes.qat import calibrate, sensitivity


class Writes(nn.Module):
    """Normalises its input in place, and counts its calls."""

    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x.mul_(0.5).add_(3.0)
        return self.last(self.norm(self.first(x)) * self.calls)


@pytest.mark.parametrize("passes", ["qat", "ptq", "sparsify{criterion=wanda}"])
def test_a_module_that_writes_sees_each_batch_as_it_was_given(passes: str) -> None:
    torch.manual_seed(0)
    data = [torch.randn(16, 8) for _ in range(3)]
    given = torch.cat(data)
    module = fxopt.optimize(Writes().eval(), data[0].clone(), passes, devices=(), calibration_data=data).module
    if passes == "qat":
        sensitivity(module, data)
    assert torch.equal(torch.cat(data), given)
    assert module.get_buffer("calls") == 0
    if "sparsify" not in passes:
        assert module.get_buffer("input_fake_quant.first.maximum") == given.max() * 0.5 + 3.0


class Remembers(nn.Module):
    """Counts its calls, and keeps the last output, in plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.count, self.last = nn.Linear(8, 4), 0, None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count += 1
        self.last = self.layer(x).relu()
        return self.last


@pytest.mark.parametrize("passes", ["qat", "ptq", "sparsify{criterion=wanda}"])
def test_plain_attributes_stay_as_they_were(passes: str) -> None:
    data = [torch.randn(16, 8), torch.full((16, 8), torch.inf)]
    result = fxopt.optimize(Remembers().eval(), data[0], passes, devices=(), calibration_data=data)
    if passes == "qat":
        sensitivity(result.module, data)
    assert (result.module.count, result.module.last) == (0, None)
    told = [skip for skip in result.ledger.skips if "NaN or Inf reached it" in skip.reason]
    assert bool(told) is ("sparsify" not in passes)


ONE_BATCH = [torch.ones(16, 8), {"x": torch.ones(16, 8)}, Inputs((torch.ones(16, 8),))]


@pytest.mark.parametrize("data", ONE_BATCH, ids=lambda data: type(data).__name__)
def test_data_that_is_one_batch_is_refused_by_name(data: Any) -> None:
    kind, x = type(data).__name__, torch.ones(16, 8)
    module = fxopt.optimize(Writes().eval(), x, "qat", devices=(), calibration_data=[x]).module
    takes: dict[str, Callable[[], object]] = {
        "calibration_data": lambda: fxopt.optimize(Writes().eval(), x, "ptq", devices=(), calibration_data=data),
        "calibrate": lambda: calibrate(module, data),
        "sensitivity": lambda: sensitivity(module, data),
    }
    for who, take in takes.items():
        with pytest.raises(
            PassError, match=f"{who}: the data is one {kind}; give an iterable of inputs, each a tensor"
        ):
            take()
