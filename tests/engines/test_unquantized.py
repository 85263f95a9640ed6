"""A quantised module without its quantisers computes what it did in floats, and is measured beside its integers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.bench import Verdict
from fxopt.engines import builder, candidates, climb, ladder
from fxopt.engines.candidates import Rung
from fxopt.engines.contract import Engine
from fxopt.engines.onednn import OneDNN
from fxopt.engines.openvino import OpenVINO
from fxopt.engines.unquantized import unquantized
from fxopt.errors import EngineError
from fxopt.modules import is_quantized
from passes import PTQ, QAT, Clean, Fuse, QuantizeFreeze
from tests.engines.test_others import needs
from tests.passes.programs import assert_close
from tests.report.record_example import comparison


class Reads(nn.Module):
    """Looks up rows, goes over them step by step, and lets them attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.steps = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.last = nn.Parameter(torch.randn(3, 8))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.steps(self.table(tokens))[0]
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return nn.functional.linear(x, self.last)


def convolutions() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(64, 5)]
    return nn.Sequential(*layers)


CASES: dict[str, Any] = {
    "convolutions": (convolutions, torch.randn(2, 3, 6, 6), True),
    "convolutions with norms of their own": (convolutions, torch.randn(2, 3, 6, 6), False),
    "modules that use weights as a whole": (Reads, torch.randint(0, 10, (2, 5)), False),
}


@pytest.mark.parametrize("name", CASES)
def test_without_quantisers_it_is_the_float_module(name: str) -> None:
    make, x, fused = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    passes = [Clean(), *([Fuse()] if fused else []), PTQ(equalize=False, correct=False)]
    quantised = fxopt.optimize(model, x, passes, calibration_data=[x], devices=()).module
    assert is_quantized(quantised)
    found = unquantized(quantised)
    assert not is_quantized(found)
    assert is_quantized(quantised), "it was a copy"
    assert_close(model(x), found(x))
    assert not torch.allclose(model(x), quantised(x), atol=1e-6)


def lowered(engine: str) -> fxopt.Result:
    torch.manual_seed(0)
    model, x = convolutions().eval(), torch.randn(2, 3, 6, 6)
    passes = [Clean(), Fuse(), PTQ(weights="int7"), QuantizeFreeze()]
    return fxopt.optimize(model, x, passes, calibration_data=[x], devices=(), engine=engine, engine_seconds=2.0)


@pytest.mark.parametrize(
    ("engine", "in_bfloat16"),
    [
        ("onnxruntime", "onednn in floats after cast{dtype=bf16}"),
        ("openvino", "openvino{precision=bf16} in floats"),
        ("inductor", "inductor in floats after cast{dtype=bf16}"),
    ],
)
def test_integers_are_measured_beside_floats(engine: str, in_bfloat16: str, monkeypatch: pytest.MonkeyPatch) -> None:
    needs(engine)
    for one in (OneDNN, OpenVINO):  # where the CPU has no kernels for bfloat16 they would drop out
        monkeypatch.setattr(one, "in_vain", Engine.in_vain)
    record = lowered(engine).record
    engines = record["engines"]
    assert engines is not None
    asked, float32, bfloat16 = engines["rungs"][1:]
    assert [rung["label"] for rung in engines["rungs"]] == ["eager", engine, f"{engine} in floats", in_bfloat16]
    assert engines["chosen"] == 1
    assert [rung["dropped"] for rung in engines["rungs"]] == [""] * 4
    assert all(rung["latency"] for rung in engines["rungs"])
    assert "operators on integers" in str(asked["reasons"])
    assert "operators on integers" not in str([float32["reasons"], bfloat16["reasons"]])
    assert float(float32["relative_error"] or 0.0) < 1e-5
    text = fxopt.report.render(record, "table")
    assert all(word in text for rung in engines["rungs"] for word in rung["label"].split())


def test_an_engine_that_cannot_be_built_says_so_before_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []

    def build(engine: Engine, *_: Any) -> None:
        built.append(engine.name)
        raise EngineError("out of luck")

    monkeypatch.setattr(builder, "build", build)
    with pytest.raises(EngineError, match="out of luck"):
        lowered("onnxruntime")
    assert built == ["eager", "onnxruntime"]


@pytest.mark.parametrize("asked", ["auto", "all"])
def test_among_all_engines_floats_are_measured_and_never_chosen(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def together(before: Any, rungs: list[Rung], *_: Any) -> dict[str, fxopt.Comparison]:
        return {rung.label: comparison(Verdict.FASTER, 0.1 if rung.in_floats else 0.5) for rung in rungs}

    torch.manual_seed(0)
    model, x = convolutions().eval(), torch.randn(2, 3, 6, 6)
    module = fxopt.optimize(model, x, [QAT()], devices=()).module
    beside = tuple(rung for rung in candidates.IN_FLOATS if rung.engine == "onednn")
    monkeypatch.setattr(candidates, "ON_CPU", (Rung("eager"), Rung("onednn")))
    monkeypatch.setattr(candidates, "IN_FLOATS", beside)
    monkeypatch.setattr(OneDNN, "in_vain", Engine.in_vain)
    monkeypatch.setattr(ladder, "_together", together)
    found = climb(asked, model, module, fxopt.Inputs.of(x))
    in_floats = ["onednn in floats", "onednn in floats after cast{dtype=bf16}"]
    assert [rung.label for rung in found.rungs] == ["eager", "onednn", *in_floats]
    assert all(rung.comparison for rung in found.rungs)
    assert found.chosen in ([None] if asked == "all" else found.rungs[:2])


def test_without_quantisers_nothing_is_beside_the_engine() -> None:
    needs("onnxruntime")
    model, x = convolutions().eval(), torch.randn(2, 3, 6, 6)
    module = fxopt.capture(model, x).module
    found = climb("onnxruntime", model, module, fxopt.Inputs.of(x), budget_seconds=1.0)
    assert [rung.label for rung in found.rungs] == ["eager", "onnxruntime"]
