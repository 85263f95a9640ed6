"""Two processes on one machine: the ranges of quantisers are those of what both have seen."""

from __future__ import annotations

from pathlib import Path

from tests.torchrun import torchrun

TRAINING = """
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from fxopt import capture
from fxopt.modules import FakeQuantize
from passes import QAT
from tests.passes.programs import rewrite

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
x = torch.randn(16, 4)
mine = x[rank::2] * (1 + 9 * rank)
program = capture(model.train(), (mine,)).module
rewrite(QAT(), program)
parallel = DistributedDataParallel(program)
optimizer = torch.optim.SGD(parallel.parameters(), 1e-3)
for _ in range(3):
    optimizer.zero_grad()
    parallel(mine).square().sum().backward()
    optimizer.step()
first = program.get_submodule("input_fake_quant.0")
seen = torch.cat([x[0::2], x[1::2] * 10])
for name, value in program.state_dict().items():
    if torch.is_floating_point(value):
        other = value.clone()
        dist.broadcast(other, 0)
        assert torch.equal(other, value), name
lone = FakeQuantize()
lone(x if rank == 0 else x[:0])
assert lone.minimum == x.min() and lone.maximum == x.max(), "a process without values joins in"
if rank == 0:
    print(first.minimum.item(), first.maximum.item(), seen.min().item(), seen.max().item())
dist.destroy_process_group()
"""


def test_ranges_are_joined_over_the_processes(tmp_path: Path) -> None:
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    minimum, maximum, smallest, largest = map(float, torchrun(script).split())
    assert (minimum, maximum) == (smallest, largest)
