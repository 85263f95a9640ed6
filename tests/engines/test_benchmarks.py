"""The benchmark scripts: what they do without the machine that they are for, and how their table is made."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

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
def peers() -> ModuleType:
    found = importlib.util.spec_from_file_location("peers", BENCHMARKS / "peers.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_rows_that_are_run_again_replace_those_before(peers: ModuleType, tmp_path: Path) -> None:
    record = tmp_path / "peers.jsonl"
    assert peers.read(record) == []
    record.write_text(
        '{"model": "a", "batch": 1, "x": 1}\n{"model": "b", "batch": 1}\n{"model": "a", "batch": 1, "x": 2}\n'
    )
    assert peers.read(record) == [{"model": "a", "batch": 1, "x": 2}, {"model": "b", "batch": 1}]


def test_the_table_tells_who_could_not_take_a_model(peers: ModuleType) -> None:
    def arm(speedup: float) -> dict[str, float]:
        return {"ms": 10.0, "speedup": speedup, "low": speedup - 0.1, "high": speedup + 0.1, "build_seconds": 1.5,
                "relative_error": 2e-7}  # fmt: skip

    rows = [
        {"model": "resnet18", "batch": 1, "arms": {"eager": arm(1), "fx fuse": {"failed": "no"}, "onednn": arm(2)}},
        {"model": "bert", "batch": 1, "arms": {"eager": arm(1), "fx fuse": arm(1.1), "onednn": arm(0.5)}},
        {"model": "gpt2", "batch": 1, "arms": {}, "failed": "out of memory"},
    ]
    text = peers.render(rows)
    assert "| resnet18" in text
    resnet = next(line for line in text.splitlines() if line.startswith("| resnet18"))
    assert [cell.strip() for cell in resnet.split("|")[3:5]] == ["10.0 ms", "-"]
    assert "2.00 [1.90, 2.10]" in text
    means = [line for line in text.splitlines() if line.startswith("| geometric mean")]
    assert [cell.strip() for cell in means[0].split("|")[3:-1]] == ["1.00", "-", "2.00"]
    assert [cell.strip() for cell in means[1].split("|")[3:-1]] == ["1.00", "1.10 of 1", "1.00"]
    assert "gpt2 at 1: out of memory" in text
