"""A quantised module without its quantisers computes what it did in floats, and is measured beside its integers."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.engines import climb
from fxopt.engines.unquantized import unquantized
from fxopt.modules import is_quantized
from passes import PTQ, Clean, Fuse, QuantizeFreeze
from tests.engines.test_others import needs
from tests.passes.programs import assert_close


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


@pytest.mark.parametrize(
    ("engine", "in_bfloat16"),
    [("onnxruntime", "onednn in floats after cast{dtype=bf16}"), ("openvino", "openvino{precision=bf16} in floats")],
)
def test_integers_are_measured_beside_floats(engine: str, in_bfloat16: str) -> None:
    needs(engine)
    torch.manual_seed(0)
    model, x = convolutions().eval(), torch.randn(2, 3, 6, 6)
    passes = [Clean(), Fuse(), PTQ(weights="int7"), QuantizeFreeze()]
    result = fxopt.optimize(model, x, passes, calibration_data=[x], devices=(), engine=engine, engine_seconds=2.0)
    engines = result.record["engines"]
    assert engines is not None
    assert [(rung["engine"], rung["in_floats"]) for rung in engines["rungs"]] == [
        ("eager", False),
        (engine, True),
        (in_bfloat16.split("{")[0].split()[0], True),
        (engine, False),
    ]
    assert engines["chosen"] == 3
    float32, bfloat16 = engines["rungs"][1:3]
    assert float(float32["relative_error"] or 0.0) < 1e-5
    assert bfloat16["latency"] or "bfloat16" in bfloat16["dropped"], "where the CPU has no kernels for it"
    text = fxopt.report.render(result.record, "table")
    assert re.search(rf"\n *{engine} in floats +[\d.]+ .?s", text)
    assert in_bfloat16 in text


def test_without_quantisers_nothing_is_beside_the_engine() -> None:
    needs("onnxruntime")
    model, x = convolutions().eval(), torch.randn(2, 3, 6, 6)
    module = fxopt.capture(model, x).module
    ladder = climb("onnxruntime", model, module, fxopt.Inputs.of(x), budget_seconds=1.0)
    assert [rung.label for rung in ladder.rungs] == ["eager", "onnxruntime"]
