"""`fxopt lora`: from a run to a file of PEFT, to merged weights."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

SOURCE = """
def get_model():
    torch.manual_seed(0)
    return Net()
"""


def fxopt(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fxopt", *arguments], capture_output=True, text=True)


@pytest.fixture
def adapter(write):
    write(SOURCE)
    run = fxopt(
        "run", "model.py", "--passes", "lora{rank=2,alpha=8.0}", "--device", "cpu", "--budget", "0.1", "--out", "result"
    )
    assert run.returncode == 0, run.stderr
    assert "14 of 30 parameters train" in run.stdout
    done = fxopt("lora", "export", "result", "--target", "model.py", "--out", "adapter")
    assert (done.returncode, done.stdout) == (0, "wrote adapter\n"), done.stderr
    return "adapter"


def test_export_show_merge(adapter, tmp_path):
    tensors = load_file(tmp_path / adapter / "adapter_model.safetensors")
    assert {key: tuple(t.shape) for key, t in tensors.items()} == {
        "base_model.model.fc.lora_A.weight": (2, 3),
        "base_model.model.fc.lora_B.weight": (4, 2),
    }
    shown = json.loads(fxopt("lora", "show", adapter, "--json").stdout)
    assert shown["layers"] == [{"name": "fc", "rank": 2, "scale": 4.0, "a": "2x3", "b": "4x2"}]
    assert "fc" in fxopt("lora", "show", adapter).stdout

    from safetensors.torch import save_file

    tensors["base_model.model.fc.lora_B.weight"].fill_(1)
    save_file(tensors, tmp_path / adapter / "adapter_model.safetensors")
    done = fxopt("lora", "merge", adapter, "--target", "model.py", "--out", "merged.safetensors")
    assert (done.returncode, done.stdout) == (0, "wrote merged.safetensors\n"), done.stderr
    torch.manual_seed(0)
    weight = torch.nn.Linear(3, 4).weight
    expected = weight + 4 * tensors["base_model.model.fc.lora_B.weight"] @ tensors["base_model.model.fc.lora_A.weight"]
    assert torch.allclose(load_file(tmp_path / "merged.safetensors")["fc.weight"], expected, atol=1e-6)


def test_what_is_no_adapter(tmp_path):
    done = fxopt("lora", "show", str(tmp_path))
    assert done.returncode == 2
    assert "has no 'adapter_config.json'" in done.stderr
