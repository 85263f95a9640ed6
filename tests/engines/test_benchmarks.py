"""The benchmark scripts: what they do without the machine that they are for, and how their table is made."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_benchmark_says_so_and_is_fine(tmp_path: Path) -> None:
    order = [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path / "gpu.json")]
    done = subprocess.run(order, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing was measured: no CUDA device" in done.stderr
    assert not (tmp_path / "gpu.json").exists()


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a script as it is imported when it runs."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_rows_that_are_run_again_replace_those_before(benchmarks: Callable[[str], ModuleType], tmp_path: Path) -> None:
    peers, record = benchmarks("peers"), tmp_path / "peers.json"
    assert peers.read(record) == {}
    rows = {("a", 1): {"model": "a", "batch": 1, "x": 1}, ("b", 1): {"model": "b", "batch": 1}}
    record.write_text(peers.written(rows.values()))
    assert peers.read(record) == rows


def arm(milliseconds: float, **facts: Any) -> dict[str, Any]:
    times = [1e-3 * milliseconds] * 8
    return {
        "ms": milliseconds,
        "times": times,
        "build_seconds": 1.5,
        "relative_error": 2e-7,
        "peak_bytes": 2**20,
    } | facts


def row(model: str, kind: str, **arms: dict[str, Any]) -> dict[str, Any]:
    named = {"fuse": "fx fuse", "bf16": "openvino bf16", "bf16_again": "openvino bf16, again", "auto2": "auto 1e-2"}
    arms = {named.get(name, name): found for name, found in arms.items()}
    return {"model": model, "batch": 1, "kind": kind, "weights_bytes": 2**21, "arms": arms}


ROWS = [
    row(
        "resnet18",
        "convolutions",
        eager=arm(10),
        fuse={"failed": "no"},
        bf16=arm(4),
        onednn=arm(5),
        auto=arm(2.5, chosen="openvino"),
        auto2=arm(2, chosen="openvino{precision=bf16}"),
        bf16_again=arm(5),
    ),
    row("bert", "transformers", eager=arm(10), fuse=arm(8), bf16=arm(5), onednn=arm(20), auto=arm(4), auto2=arm(4)),
    {"model": "gpt2", "batch": 1, "arms": {}, "failed": "out of memory"},
]


def table(text: str, title: str) -> dict[str, list[str]]:
    """The rows of one table by their first cell."""
    lines = text.partition(f"## {title}")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("|")]
    return {one[0] if index else "": one[1:] if index else one for index, one in enumerate(rows)}


def test_the_table_has_speedups_and_who_could_not_take_a_model(benchmarks: Callable[[str], ModuleType]) -> None:
    text = benchmarks("peers_report").render(ROWS)
    found = table(text, "Speed-up over eager")
    assert found["resnet18 at 1"][:3] == ["10.0 ms", "-", "2.50 [2.50, 2.50]"]
    assert found["resnet18 at 1"][4] == "4.00 [4.00, 4.00] (openvino)"
    assert found["**geometric mean, all**"][1] == "1.25 [1.25, 1.25] of 1"
    assert found["**geometric mean, all**"][3] == "1.00 [1.00, 1.00]"
    assert found["**geometric mean, convolutions**"][3] == "2.00 [2.00, 2.00]"
    assert "- gpt2 at 1: out of memory" in text


def test_each_of_ours_is_held_against_each_peer_of_its_precision(benchmarks: Callable[[str], ModuleType]) -> None:
    text = benchmarks("peers_report").render(ROWS)
    auto = table(text, "`auto` beside each: how many times as fast")
    assert auto[""] == ["eager", "fx fuse"]
    assert auto["bert at 1"] == ["2.50 [2.50, 2.50]", "2.00 [2.00, 2.00]"]
    rounded = table(text, "`auto 1e-2` beside each: how many times as fast")
    assert rounded[""] == ["eager", "fx fuse", "openvino bf16"]
    assert rounded["**geometric mean, all**"][2] == "1.58 [1.58, 1.58]"


def test_two_builds_of_the_same_are_held_against_each_other(benchmarks: Callable[[str], ModuleType]) -> None:
    rows = [*ROWS[:2], row("swin_t", "transformers", eager=arm(10), bf16=arm(5), bf16_again=arm(4))]
    text = benchmarks("peers_report").render(rows)
    found = table(text, "Another build of the same")
    assert found["resnet18 at 1"] == ["-", "-", "0.80 [0.80, 0.80]"]
    assert found["**geometric mean, whichever is faster**"] == ["-", "-", "1.25 of 2"]
    assert text.count("again") == 0, "they are no arms of their own elsewhere"


def test_builds_and_memory_are_told(benchmarks: Callable[[str], ModuleType]) -> None:
    text = benchmarks("peers_report").render(ROWS)
    assert table(text, "Seconds to build, and relative error")["bert at 1"][1] == "1.5 s, 2e-07"
    assert table(text, "Memory")["bert at 1"][:2] == ["2", "1 (0.5x)"]


def test_the_interval_of_a_mean_is_narrower_than_those_of_its_rows(benchmarks: Callable[[str], ModuleType]) -> None:
    mean = benchmarks("peers_report")._mean([(2.0, 1.8, 2.2)] * 4)
    assert mean == "2.00 [1.90, 2.10]"


def test_the_plot_is_drawn(benchmarks: Callable[[str], ModuleType], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    benchmarks("peers_report").plot(ROWS, tmp_path / "peers.svg")
    text = (tmp_path / "peers.svg").read_text()
    assert all(name in text for name in ("resnet18 at 1", "bert at 1", "auto 1e-2", "openvino bf16"))
