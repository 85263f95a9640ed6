"""Which layers cost the most by being quantised, and which stay floats so that an accuracy holds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import PassError, SpecError
from fxopt.record import schema
from fxopt.report import render
from passes import PTQ, QAT, Clean, Fuse
from passes.qat import sensitivity

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    """Its layer `1` has outliers that cost the others in their tensor all resolution."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        made[1].weight[:, 0] *= 40
        made[0].weight[0] /= 40
        made[0].bias[0] /= 40
    return made


def closeness(module: nn.Module) -> dict[str, float]:
    """1 for the outputs of the model itself, less for others."""
    wanted = model()(X)
    return {"loss": 0.0, "accuracy": 1 - ((module(X) - wanted).norm() / wanted.norm()).item()}


def held(max_drop: float | None, passes: str = "fuse,ptq{bits=4,equalize=false}") -> fxopt.optimize.Result:
    return fxopt.optimize(
        model(), X, passes, devices=(), evaluate=closeness, calibration_data=[X], sensitivity=True, max_drop=max_drop
    )


def test_the_costliest_layers_stay_floats_until_the_accuracy_holds() -> None:
    spared = {}
    for drop in (1.0, 0.2, 0.1, 0.0):
        result = held(drop)
        entry = result.ledger.entries[-1]
        spared[drop] = entry.spared
        assert closeness(result.module)["accuracy"] >= 1 - drop - 1e-6
        ranked = [one.name for one in entry.ranking]
        assert sorted(ranked) == ["0", "1", "2", "3"]
        assert entry.spared == set(ranked[: len(entry.spared)]) == {one.name for one in entry.ranking if one.kept}
        assert {skip.where for skip in entry.skips if "it stays a float: accuracy is" in skip.reason} == entry.spared
    assert not spared[1.0]
    assert len(spared[0.0]) == 4
    assert 0 < len(spared[0.2]) <= len(spared[0.1]) < 4
    assert "1" in spared[0.2]


@pytest.mark.parametrize(("found", "shown"), [(0.5, "0.5"), (math.nan, "nan")])
def test_an_accuracy_that_no_choice_holds_is_an_error(found: float, shown: str) -> None:
    original = model()

    def evaluate(module: nn.Module) -> dict[str, float]:
        return {"accuracy": 1.0 if module is original else found}

    with pytest.raises(PassError, match=f"accuracy is {shown} even with all 4 layers of .ptq. left floats, and 0.9"):
        fxopt.optimize(
            original, X, [PTQ()], devices=(), evaluate=evaluate, calibration_data=[X], sensitivity=True, max_drop=0.1
        )


def test_outputs_of_minus_infinity_cost_nothing() -> None:
    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x).masked_fill(torch.arange(4) == 2, -torch.inf)

    result = fxopt.optimize(Masks().eval(), X, [QAT()], devices=(), calibration_data=[X])
    assert all(math.isfinite(one.sqnr_db) for one in sensitivity(result.module, [X]))


def test_the_ranking_alone_leaves_nothing_out_and_is_in_the_report() -> None:
    result = held(None)
    (entry,) = (entry for entry in result.record["passes"] if entry["name"] == "ptq")
    assert entry["sensitivity"][0]["name"] == "1"
    assert not any(one["kept"] for one in entry["sensitivity"])
    assert all(one["seconds"] > 0 for one in entry["sensitivity"])  # type: ignore[operator]
    assert "Sensitivity" in render(result.record, "table")
    assert "sensitivity" in schema()["$defs"]["pass"]["properties"]


def test_what_is_left_a_float_is_left_so_by_freezing_too() -> None:
    result = held(0.2, "clean,fuse,ptq{bits=4,equalize=false},quantize-freeze")
    assert result.ledger.entries[2].spared
    assert not result.ledger.entries[3].ranking
    assert closeness(result.module)["accuracy"] >= 0.8


def test_a_module_that_float64_fails_in_is_ranked_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    class Narrows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layers(x)
            return y.softmax(-1, dtype=torch.float32).to(torch.float32) @ y.mT

    result = fxopt.optimize(Narrows().eval(), X, [QAT()], devices=(), calibration_data=[X])
    assert len(sensitivity(result.module, [X])) == 5
    assert capfd.readouterr().err == ""


def test_attention_products_and_tensors_that_nothing_reads_are_ranked_by_their_layer() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
            self.weight = nn.Parameter(torch.randn(4, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.attend(x, x, x, need_weights=False)[0]
            return (y @ y.transpose(1, 2)) @ (y @ self.weight.T)

    x = torch.randn(3, 5, 8)
    result = fxopt.optimize(Attends().eval(), x, [QAT()], devices=(), calibration_data=[x], sensitivity=True)
    ranking = {one.name: one for one in result.ledger.entries[0].ranking}
    assert ranking.keys() == {change.where for change in result.ledger.entries[0].changes[:-1]}
    assert ranking["attend"].seconds is not None and ranking["matmul"].seconds is None
    assert all(math.isfinite(one.sqnr_db) for one in ranking.values())
    with_less = fxopt.optimize(
        Attends().eval(), x, [QAT(exclude="attend")], devices=(), calibration_data=[x], sensitivity=True
    )
    assert "attend" not in {one.name for one in with_less.ledger.entries[0].ranking}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_drop": 0.1, "calibration_data": [X]}, "max_drop: there is no accuracy to hold; give `evaluate"),
        ({"sensitivity": True}, "sensitivity: the data is empty; give an iterable of inputs"),
    ],
)
def test_what_is_missing_is_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(PassError, match=message):
        fxopt.optimize(model(), X, [Clean(), Fuse(), QAT()], devices=(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("behind", ["quantize-freeze", "sparsify"])
def test_what_a_pass_does_that_quantises_nothing_is_not_ranked(behind: str) -> None:
    result = held(None, f"ptq,{behind}")
    quantised, other = result.ledger.entries
    assert other.changes and not other.ranking
    assert len(quantised.ranking) == len(sensitivity(result.module, [X])) == 4


@pytest.mark.parametrize("passes", ["fuse", "cast{dtype=bf16}", "sparsify,quantize-freeze"])
def test_an_accuracy_is_held_where_a_pass_quantises_alone(passes: str) -> None:
    with pytest.raises(SpecError, match="sensitivity: it goes with a pass that quantises, and there is none; add one"):
        held(0.1, passes)
