"""The zoo's smallest models, as `make zoo` runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ZOO = Path(__file__).parents[2] / "benchmarks" / "zoo.py"


@pytest.mark.parametrize("library", ["torch", "torchvision", "timm", "transformers"])
def test_small_models_are_wholly_in_the_graph_and_exact(library, tmp_path):
    pytest.importorskip(library) if library in ("torch", "transformers") else None
    out = tmp_path / "zoo.json"
    command = [sys.executable, str(ZOO), "--small", "--library", library, "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    models = json.loads(out.read_text())["models"]
    assert models
    for model in models:
        assert model["status"] == "exact", model
        assert model["opaque"] == []
        assert model["state_dict"]
        assert set(model["coverage"].values()) == {1.0}
    assert library in out.with_suffix(".md").read_text()
