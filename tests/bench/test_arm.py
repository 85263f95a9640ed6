"""The copies of modules that are measured."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxopt import optimize
from fxopt.bench import arm, compare
from fxopt.bench.arm import Arm
from fxopt.errors import EngineError
from fxopt.inputs import Inputs


@pytest.mark.parametrize(
    ("largest_cache", "timed", "is_shared"),
    [(80, True, False), (79, True, True), (80, False, True)],
    ids=["what fits a cache is copied", "what fits none is shared", "what is not timed is shared"],
)
def test_weights_are_copied_where_that_tells_in_the_time(
    largest_cache: int, timed: bool, is_shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arm, "_LARGEST_CACHE_BYTES", largest_cache)
    module = nn.Linear(4, 4)  # 16 weights and 4 biases of 4 bytes
    copied = Arm("one", module, Inputs((torch.ones(2, 4),)), torch.device("cpu"), timed=timed).module
    assert isinstance(copied, nn.Linear)
    assert torch._C._is_cow_tensor(copied.weight) is is_shared
    with torch.no_grad():
        copied.weight.zero_()
    assert module.weight.count_nonzero()


def test_lazy_modules_are_copied() -> None:
    copied = Arm("one", nn.LazyLinear(3), Inputs((torch.ones(2, 4),)), torch.device("cpu"))
    copied.call()
    assert copied.copied


class Slope(nn.Module):
    """Gives the slope of what it computes, as a network that is trained by an equation does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.layer(x).sum(), x, create_graph=True)[0]


def test_a_module_in_training_is_measured_with_the_gradients_that_its_forward_asks_for() -> None:
    x = torch.ones(3, 2)
    found = compare(Slope().train(), Slope().train(), x, pairs=2, budget_seconds=0.01)
    assert found.before_ms > 0
    assert optimize(Slope().train(), x, "clean", budget_seconds=0.01).record["latency"]["cpu"]
    with pytest.raises(EngineError, match=r"compute them within `torch.enable_grad\(\)`"):
        compare(Slope().eval(), Slope().eval(), x, pairs=2, budget_seconds=0.01)
