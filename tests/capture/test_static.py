"""Inputs by whose values Python code may decide: numbers that describe the other inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxopt
from fxopt import Inputs
from fxopt.errors import GuardError, LoadError

torch.manual_seed(0)
X = torch.randn(10, 4)


class Linear(nn.Module):
    """One layer, and what a test makes of it."""

    def __init__(self, run: Callable[[nn.Module, torch.Tensor, Any], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.run = nn.Linear(4, 4), run

    def forward(self, x: torch.Tensor, given: Any) -> torch.Tensor:
        return self.run(self.layer, x, given)


def parts(layer: nn.Module, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return torch.stack([layer(part).mean(0) for part in x.split(lengths.tolist()) if len(part) > 1])


def grid(layer: nn.Module, x: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    height, width = sizes.tolist()
    return torch.stack([layer(x[row * width : (row + 1) * width]).sum(0) for row in range(height)])


def rows(layer: nn.Module, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return layer(x) if mask.all() else layer(x[mask])


def through_numpy(layer: nn.Module, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return torch.stack([layer(x[:end]).sum(0) for end in np.cumsum(ends.numpy())])


def nested(layer: nn.Module, x: torch.Tensor, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return layer(x) * given["scale"] if given["on"].item() == 1 else x


@dataclass(frozen=True)
class Case:
    """What a forward decides by.

    Attributes:
        run: the forward.
        given: in the example.
        same: something by which it decides alike; None where only the example will do.
        other: and otherwise.
    """

    run: Callable[[nn.Module, torch.Tensor, Any], torch.Tensor]
    given: Any
    same: Any
    other: Any


CASES = {
    "parts": Case(parts, torch.tensor([3, 5, 2]), torch.tensor([4, 4, 2]), torch.tensor([9, 1, 0])),
    "as many parts": Case(parts, torch.tensor([3, 5, 2]), torch.tensor([4, 4, 2]), torch.tensor([5, 5])),
    "a grid": Case(grid, torch.tensor([2, 3]), torch.tensor([2, 4]), torch.tensor([3, 2])),
    "rows": Case(rows, torch.arange(10) < 4, torch.arange(10) > 2, torch.arange(10) < 20),
    "an array": Case(through_numpy, torch.tensor([2, 3]), None, torch.tensor([3, 2])),
    "nested": Case(
        nested,
        {"on": torch.tensor(1), "scale": torch.tensor(2.0)},
        {"on": torch.tensor(1), "scale": torch.tensor(3.0)},
        {"on": torch.tensor(0), "scale": torch.tensor(2.0)},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_decided_by_a_static_input_is_guarded(case: Case) -> None:
    module = Linear(case.run).eval()
    by_name = Inputs((X,), {"given": case.given}, static=["given"])
    for inputs in (Inputs((X, case.given), static=[1]), by_name):
        captured = fxopt.capture(module, inputs)
        assert not captured.opaque and captured.guards
        assert torch.equal(captured.module(-X, case.given), module(-X, case.given))
        if case.same is not None:
            assert torch.equal(captured.module(X, case.same), module(X, case.same))
        with pytest.raises(GuardError, match=r"test_static.py"):
            captured.module(X, case.other)


def test_a_reason_leaves_out_what_only_the_shape_is_read_of() -> None:
    def masked(layer: nn.Module, x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        counts = torch.zeros_like(x[:, 0]) + given
        return layer(x) if counts.sum() > 0 else x

    (opaque,) = fxopt.capture(Linear(masked).eval(), (X, torch.tensor(2))).opaque
    assert "the input 'given', which" in opaque.reason


@pytest.mark.parametrize("name", ["parts", "a grid", "an array"])
def test_a_reason_names_integers_by_whose_values_code_decides(name: str) -> None:
    case = CASES[name]
    (opaque,) = fxopt.capture(Linear(case.run).eval(), (X, case.given)).opaque
    assert "the input 'given', which `fxopt.Inputs(static=...)` does not name" in opaque.reason


def test_no_reason_asks_for_real_numbers_to_be_static() -> None:
    def largest(layer: nn.Module, x: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        return layer(x) if x.max() * given.max() > 0 else x

    (opaque,) = fxopt.capture(Linear(largest).eval(), (X, torch.tensor([1, 2]))).opaque
    assert "static" not in opaque.reason


def test_what_an_opaque_module_hands_on_is_static_there_too() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Linear(parts)

        def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
            return self.inner(x, lengths) if x.sum() > -1e9 else x

    captured = fxopt.capture(Outer().eval(), Inputs((X, torch.tensor([3, 5, 2])), static=[1]))
    assert [opaque.path for opaque in captured.opaque] == [""]


def test_a_long_list_is_guarded_as_a_whole() -> None:
    def run(layer: nn.Module, x: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
        return layer(x) * sum(1 for kind in kinds.tolist() if kind > 0)

    kinds = torch.ones(500, dtype=torch.int64)
    captured = fxopt.capture(Linear(run).eval(), Inputs((X, kinds), static=[1]))
    assert len(captured.guards) == 1
    kinds[499] = 0
    with pytest.raises(GuardError, match="the values of given"):
        captured.module(X, kinds)


def test_other_values_are_captured_anew_where_that_is_asked_for() -> None:
    module = Linear(parts).eval()
    inputs = Inputs((X, torch.tensor([3, 5, 2])), static=[1])
    captured = fxopt.capture(module, inputs, on_guard_failure="recapture").module
    for lengths in (torch.tensor([9, 1]), torch.tensor([8, 2]), torch.tensor([3, 5, 2])):
        assert torch.equal(captured(X, given=lengths), module(X, lengths))
    assert [each.code.count("layer(") for each in captured.captures] == [3, 1, 2]


def test_results_are_verified_and_saved_with_them(tmp_path: Any) -> None:
    module = Linear(parts).eval()
    inputs = Inputs((X, torch.tensor([3, 5, 2])), static=[1])
    result = fxopt.optimize(module, inputs, "clean,qat")
    assert not result.record["capture"]["opaque"]
    assert "3 int64 static" in result.record["inputs"]
    fxopt.save(result, tmp_path / "out")
    loaded = fxopt.load(tmp_path / "out", module)
    assert torch.equal(loaded(-X, torch.tensor([4, 4, 2])), result.module(-X, torch.tensor([4, 4, 2])))


@pytest.mark.parametrize("key", ["lengths", 2, -1])
def test_an_argument_that_is_not_there_is_told(key: str | int) -> None:
    with pytest.raises(LoadError, match=rf"static names {key!r}, which is no argument: there are 0, 'mask'"):
        Inputs((X,), {"mask": X}, static=[key])
