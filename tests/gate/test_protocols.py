"""What `benchmarks/protocols.py` makes of times that it has collected."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

from tests.gate.conftest import ROOT


@pytest.fixture(scope="module")
def protocols() -> Any:
    spec = importlib.util.spec_from_file_location("protocols", ROOT / "benchmarks" / "protocols.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def collected(number: int, cases: dict[str, float], drift: float) -> dict[str, Any]:
    """A window in which the machine slows down from part to part, and all sides with it."""
    draw = np.random.default_rng(number)

    def times(slower: float, part: int) -> list[float]:
        drawn: list[float] = (0.002 * slower * (1 + drift * part) * np.exp(0.01 * draw.standard_normal(40))).tolist()
        return drawn

    sides = {"base": 1.0, "again": 1.0, **{case: 1 + slower for case, slower in cases.items()}}
    parts = [[{side: times(slower, part) for side, slower in sides.items()} for _ in range(3)] for part in range(3)]
    return {"cell": "1:off", "window": number, "parts": parts, "seconds": 9.0, "cpu": "Example CPU"}


def test_all_rules_judge_the_same_times(protocols):
    cases = {case: slower for case, (slower, _) in protocols.CASES.items()}
    done = [collected(number, cases, drift=0.05) for number in range(4)]
    command = {"seconds": 20.0, "bare": 1.0, "windows": 17.0, "calls": 15.0, "base_ms": 5.0}
    record = protocols.judged(done) | {"commands": [command], "commands_cpu": "Another CPU"}
    cell = record["cells"]["1:off"]
    assert cell["true"] == pytest.approx({case: 1 + slower for case, slower in cases.items()}, abs=0.01)
    for said in cell["verdicts"]:
        assert {case: said[case]["fxopt ci"] for case in cases} == {
            "A/A": "OK",
            "+10 %": "REGRESSION",
            "+5 %": "REGRESSION",
        }
        # One side after the other, the drift counts as a difference.
        assert said["A/A"]["asv"] == "REGRESSION"
    text = protocols.render(record)
    assert "| fxopt ci                      | 0 [0, 60] / 100 of 4" in text
    assert "20.0 to 20.0 s from call to exit" in text
    assert "in processes that start there, 3.0 to 3.0 s, 15 to 15 %, of which a script" in text
    assert "takes 1.0 to 1.0 s; the rest, 2.0 to 2.0 s, 10 to 10 %, is the tool's own" in text
    assert "Outside of the timed calls themselves 5.0 to 5.0 s, 25 to 25 %. Processor: Another CPU" in text
