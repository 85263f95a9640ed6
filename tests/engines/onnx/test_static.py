"""Static inputs of an exported model, which is built for their values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxopt
from fxopt import Inputs
from fxopt.errors import EngineError, GuardError

ENGINES = pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
X = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
        lengths = given["lengths"]
        places = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        pooled = torch.stack([self.layer(part).mean(0) for part in x.split(lengths.tolist())])
        return pooled[places] + lengths.sum()


class Rows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        kept = torch.zeros(2, *x.shape)
        kept[:, mask] = self.layer(x[mask])
        return kept


class Ends(nn.Module):
    def forward(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return torch.stack([x[: ends[0]].mean(0), x[ends[0] : ends[1]].mean(0)])


class Given(nn.Module):
    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        x, size = given
        return x[:, : int(size)] * size


CASES: dict[str, tuple[Callable[[], nn.Module], str, torch.Tensor, torch.Tensor]] = {
    "parts": (Parts, "lengths", torch.tensor([3, 5, 2]), torch.tensor([4, 4, 2])),
    "rows": (Rows, "mask", torch.arange(10) > 3, torch.arange(10) > 4),
    "ends": (Ends, "ends", torch.tensor([3, 7]), torch.tensor([4, 7])),
}


@ENGINES
@pytest.mark.parametrize("case", CASES)
def test_what_is_computed_of_them_is_part_of_the_model(engine: str, case: str) -> None:
    build, name, values, others = CASES[case]
    module = build().eval()
    executable = fxopt.lower(module, Inputs((X,), {name: values}, static=[name]), engine=engine)
    with torch.no_grad():
        assert torch.allclose(executable(-X, **{name: values}), module(-X, **{name: values}), atol=1e-5)
    assert any("are those of the example" in reason.reason for reason in executable.reasons)
    with pytest.raises(EngineError, match="is static, and holds other values than it was built for"):
        executable(X, **{name: others})


@ENGINES
def test_of_arguments_that_a_star_takes_those_that_are_named_are_constants(engine: str) -> None:
    executable = fxopt.lower(Given().eval(), Inputs((X, torch.tensor(2)), static=[1]), engine=engine)
    assert torch.equal(executable(-X, torch.tensor(2)), -2 * X[:, :2])
    with pytest.raises(EngineError, match="is static"):
        executable(X, torch.tensor(3))
    first = fxopt.lower(Given().eval(), Inputs((X, torch.tensor(2)), static=[0, 1]), engine=engine)
    assert [reason.reason for reason in first.reasons][-1].startswith("the values of")


@ENGINES
def test_the_batch_size_is_free_beside_them(engine: str) -> None:
    class Halved(nn.Module):
        def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
            return x[:, : at.item()] * at

    module = Halved().eval()
    executable = fxopt.lower(module, Inputs((X, torch.tensor(2)), static=[1]), engine=engine)
    for batch in (10, 3, 1):
        given = X[:batch], torch.tensor(2)
        assert torch.allclose(executable(*given), module(*given))


@ENGINES
def test_a_decision_on_weights_is_made_before_the_export(engine: str) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(4, 4), nn.Parameter(torch.ones(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * self.scale if self.scale.item() > 0.5 else self.layer(x)

    module = Scaled().eval()
    executable = fxopt.lower(module, X, engine=engine)
    with torch.no_grad():
        assert torch.allclose(executable(X), module(X), atol=1e-5)
    with torch.no_grad():
        executable.module.scale.zero_()  # type: ignore[union-attr, operator]
    with pytest.raises(GuardError, match=r"scale.* > 0\.5"):
        executable.load_state_dict(executable.state_dict())
        executable(X)
