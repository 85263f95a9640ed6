"""Two processes on one machine: the example under torchrun, and adapters under FSDP2."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torchrun import ROOT, torchrun

SHARDED = """
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from fxopt import capture
from passes import LoRA
from passes.lora import trainable_parameters
from passes.lora.inject import inject

dist.init_process_group("gloo")
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
x = torch.randn(6, 8)
module = capture(model, (x,)).module
inject(module, LoRA(rank=2))
whole = capture(model, (x,)).module
inject(whole, LoRA(rank=2))
whole.load_state_dict(module.state_dict())
fully_shard(module, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
for each in (module, whole):
    optimizer = torch.optim.SGD(trainable_parameters(each), 0.5)
    for _ in range(3):
        optimizer.zero_grad()
        each(x).square().sum().backward()
        optimizer.step()
difference = (module(x) - whole(x)).abs().max().item()
differences = [None, None]
dist.all_gather_object(differences, difference)
if dist.get_rank() == 0:
    print(*differences)
dist.destroy_process_group()
"""


def test_the_example_with_two_processes(tmp_path: Path) -> None:
    printed = torchrun(ROOT / "examples" / "lora_digits.py", "--epochs", "2", "--out", str(tmp_path))
    assert "in PEFT: largest difference of the outputs 0.0e+00" in printed
    line = next(line for line in printed.splitlines() if line.startswith("digits 5-9"))
    before, after, merged = (
        float(word.strip(",")) for word in line.split() if word.strip(",").replace(".", "").isdigit()
    )
    assert after > before + 0.4
    assert merged == pytest.approx(after, abs=0.006)


def test_fsdp2(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    differences = [float(each) for each in torchrun(script).split()]
    assert len(differences) == 2 and max(differences) < 1e-4
