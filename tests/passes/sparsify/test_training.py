"""Zeros stay where masks have them while a module trains, and masks move along their schedule."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxopt.graph import GraphModule
from passes import Sparsify, sparsify
from passes.sparsify import SparsityScheduler
from tests.passes.sparsify.test_masks import Functional, Recurrent, masked
from tests.torchrun import ROOT, torchrun

OPTIMIZERS = {
    "sgd-momentum": lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda parameters: torch.optim.Adam(parameters, 1e-2),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-2, weight_decay=0.1),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 8, 3, padding=1), nn.Flatten(), nn.ReLU(), nn.Linear(64, 16), nn.Linear(16, 4))


def train(module: nn.Module, optimizer: torch.optim.Optimizer, scheduler: SparsityScheduler | None, steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = torch.randn(16, 1, 8, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(module(x), (x.sum((1, 2)) > 0).long()).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def zeros_are_exact(module: nn.Module) -> bool:
    found = sparsify.masked_weights(module)
    return bool(found) and all(torch.equal(each.weight != 0, each.mask.mask) for each in found)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("spec", ["sparsify{amount=0.8}", "sparsify{granularity=2:4,exclude=['0']}"])
def test_zeros_are_where_the_mask_says_after_200_steps(spec: str, name: str) -> None:
    module = masked(network().train(), (torch.randn(2, 1, 8),), spec)
    before = [(each.mask.mask.clone(), each.weight.detach().clone()) for each in sparsify.masked_weights(module)]
    optimizer = OPTIMIZERS[name](module.parameters())
    scheduler = SparsityScheduler(module, optimizer)
    train(module, optimizer, scheduler, 200)
    assert zeros_are_exact(module)
    for each, (mask, weight) in zip(sparsify.masked_weights(module), before, strict=True):
        assert torch.equal(each.mask.mask, mask)
        assert not torch.equal(each.weight, weight), "what is kept trains"


def test_without_the_scheduler_weights_move_under_the_mask() -> None:
    """What the scheduler is for: a momentum from before the mask moves weights whose gradient is masked."""
    module = masked(network().train(), (torch.randn(2, 1, 8),), "sparsify{schedule=cubic,steps=1}")
    optimizer = OPTIMIZERS["adam"](module.parameters())
    train(module, optimizer, None, 3)
    for each in sparsify.masked_weights(module):
        each.mask.mask.copy_(torch.rand(each.weight.shape) > 0.5)
        each.apply()
    train(module, optimizer, None, 5)
    assert not zeros_are_exact(module)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_keep_their_zeros(kind: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 12, (4, 5))
    module = masked(Recurrent(kind).train(), (ids,))
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    scheduler = SparsityScheduler(module, optimizer)
    for _ in range(20):
        optimizer.zero_grad()
        module(ids).square().mean().backward()
        optimizer.step()
        scheduler.step()
    assert zeros_are_exact(module)


def formula(schedule: str, amount: float, step: int, begin: int, steps: int) -> float:
    share = min(max(step - begin, 0) / steps, 1.0)
    return amount * share if schedule == "linear" else amount + (0 - amount) * (1 - share) ** 3


@pytest.mark.parametrize("schedule", ["cubic", "linear"])
@pytest.mark.parametrize(("begin", "steps", "every"), [(0, 20, 1), (5, 20, 4), (0, 7, 10)])
def test_schedules_follow_their_formula(schedule: str, begin: int, steps: int, every: int) -> None:
    spec = f"sparsify{{amount=0.9,schedule={schedule},begin={begin},steps={steps},every={every}}}"
    module = masked(nn.Sequential(nn.Linear(50, 40)).train(), (torch.randn(2, 50),), spec)
    (found,) = sparsify.masked_weights(module)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    scheduler = SparsityScheduler(module, optimizer)
    assert not (~found.mask.mask).any()
    last = 0.0
    for step in range(1, begin + steps + 5):
        scheduler.step()
        if step >= begin and ((step - begin) % every == 0 or step == begin + steps):
            last = formula(schedule, 0.9, step, begin, steps)
        assert scheduler.amounts[0] == pytest.approx(last)
        assert found.mask.sparsity == pytest.approx(last, abs=1 / 2000)
    assert found.mask.sparsity == pytest.approx(0.9, abs=1e-6)
    assert scheduler.sparsity == {"0": found.mask.sparsity}


def test_a_ratio_is_reached_in_whole_weights_of_each_group() -> None:
    spec = "sparsify{granularity=1:4,schedule=linear,steps=6,every=1}"
    module = masked(nn.Sequential(nn.Linear(8, 8)).train(), (torch.randn(2, 8),), spec)
    (found,) = sparsify.masked_weights(module)
    scheduler = SparsityScheduler(module, torch.optim.SGD(module.parameters(), 0.1))
    kept = []
    for _ in range(6):
        scheduler.step()
        counts = found.mask.mask.reshape(-1, 4).sum(1)
        assert (counts == counts[0]).all()
        kept.append(int(counts[0]))
    assert kept == [4, 3, 3, 2, 2, 1]


def test_removed_weights_stay_removed_along_a_schedule() -> None:
    spec = "sparsify{amount=0.8,schedule=cubic,steps=30,every=3}"
    module = masked(network().train(), (torch.randn(2, 1, 8),), spec)
    optimizer = OPTIMIZERS["adam"](module.parameters())
    scheduler = SparsityScheduler(module, optimizer)
    gone = [torch.zeros_like(each.mask.mask) for each in sparsify.masked_weights(module)]
    for _ in range(10):
        train(module, optimizer, scheduler, 3)
        now = [~each.mask.mask for each in sparsify.masked_weights(module)]
        assert all((after | ~before).all() for before, after in zip(gone, now, strict=True))
        gone = [each.clone() for each in now]
    assert zeros_are_exact(module)


@pytest.mark.parametrize("fused", [False, True])
def test_scores_are_unscaled_and_know_nothing_of_a_step_that_overflowed(fused: bool) -> None:
    torch.manual_seed(0)
    spec = "sparsify{amount=0.5,criterion=movement,schedule=linear,steps=9,every=9}"
    scores = {}
    for scaled in (False, True):
        module = masked(nn.Sequential(nn.Linear(6, 4)).train(), (torch.randn(2, 6),), spec)
        with torch.no_grad():
            module.get_parameter("0.weight").fill_(0.1)
            module.get_parameter("0.bias").zero_()
        (found,) = sparsify.masked_weights(module)
        optimizer = torch.optim.Adam(module.parameters(), 0.1, fused=fused, weight_decay=0.1)
        scheduler = SparsityScheduler(module, optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
        for factor in (1.0, torch.inf, 0.5) if scaled else (1.0, 0.5):
            x = factor * torch.ones(5, 6)
            optimizer.zero_grad()
            scaler.scale(module(x).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
        scores[scaled] = found.mask.score.detach()
    torch.testing.assert_close(scores[True], scores[False])


def test_scores_of_a_closure_are_taken_before_the_optimizer_moves_them() -> None:
    spec = "sparsify{amount=0.5,criterion=movement,schedule=linear,steps=9,every=9}"
    module = masked(nn.Sequential(nn.Linear(6, 4)).train(), (torch.randn(2, 6),), spec)
    (found,) = sparsify.masked_weights(module)
    optimizer = torch.optim.Adam(module.parameters(), 0.1)
    SparsityScheduler(module, optimizer)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = module(torch.ones(5, 6)).square().sum()
        loss.backward()
        return loss

    wanted = -found.weight.detach() * 10 * (module(torch.ones(1, 6)).detach().T)
    optimizer.step(closure)
    torch.testing.assert_close(found.mask.score.detach(), wanted)
    assert found.mask.score.grad is None


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("criterion", ["movement", "taylor"])
def test_scores_are_sums_of_dense_gradients(criterion: str, scope: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4)).train()
    spec = f"sparsify{{amount=0.5,criterion={criterion},scope={scope},schedule=linear,steps=3,every=1}}"
    module = masked(model, (torch.randn(2, 6),), spec)
    (found,) = sparsify.masked_weights(module)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    scheduler = SparsityScheduler(module, optimizer)
    expected = torch.zeros(4, 6)
    for _ in range(3):
        x, old = torch.randn(5, 6), found.weight.detach().clone()
        optimizer.zero_grad()
        module(x).square().sum().backward()
        dense = 2 * (x @ old.T + model[0].bias.detach() * 0 + module.get_parameter("0.bias").detach()).T @ x
        assert torch.equal(found.weight.grad, torch.where(found.mask.mask, found.weight.grad, 0))
        expected += (old * dense).abs() if criterion == "taylor" else -old * dense
        optimizer.step()
        torch.testing.assert_close(found.mask.score.detach(), expected, rtol=1e-4, atol=1e-4)
        scheduler.step()
        assert zeros_are_exact(module) or not found.weight[~found.mask.mask].any()
    assert found.mask.sparsity == 0.5
    kept = expected[found.mask.mask].min()
    assert kept >= expected[~found.mask.mask].max()


def test_a_scheduler_goes_on_where_it_stopped() -> None:
    spec = "sparsify{amount=0.8,schedule=cubic,steps=20,every=2}"
    whole, parts = (masked(network().train(), (torch.randn(2, 1, 8),), spec) for _ in range(2))
    optimizers = [torch.optim.SGD(module.parameters(), 0.05) for module in (whole, parts)]
    first = SparsityScheduler(whole, optimizers[0])
    train(whole, optimizers[0], first, 0)
    before = SparsityScheduler(parts, optimizers[1])
    for _ in range(8):
        first.step(), before.step()
    after = SparsityScheduler(parts, optimizers[1])
    after.load_state_dict(before.state_dict())
    for _ in range(12):
        first.step(), after.step()
    assert after.sparsity == first.sparsity


def test_functional_weights_train() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    module = masked(Functional().train(), (x,))
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    scheduler = SparsityScheduler(module, optimizer)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = module(x).square().mean()
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        scheduler.step()
    assert losses[-1] < losses[0]
    assert zeros_are_exact(module)


@pytest.mark.filterwarnings("ignore")
def test_compiles_with_its_gradients() -> None:
    module: GraphModule = masked(Functional().train(), (torch.randn(4, 8),), "sparsify{amount=0.5}")
    x: Tensor = torch.randn(4, 8)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    expected = module(x)
    expected.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad()
    found = compiled(x)
    torch.testing.assert_close(found, expected)
    found.square().sum().backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


SCRIPT = """
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import fxopt
from fxopt import capture
from fxopt.pipeline import run_passes
from fxopt.spec import parse
from passes import sparsify

dist.init_process_group("gloo")
rank = dist.get_rank()
for criterion in ("magnitude", "movement", "random"):
    torch.manual_seed(0)
    captured = capture(nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).train(), (torch.randn(2, 8),))
    run_passes(captured, parse(f"sparsify{{amount=0.8,criterion={criterion},schedule=cubic,steps=20,every=2}}"))
    module = DistributedDataParallel(captured.module)
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    scheduler = sparsify.SparsityScheduler(module, optimizer)
    torch.manual_seed(rank)
    for _ in range(30):
        optimizer.zero_grad()
        module(torch.randn(6, 8)).square().sum().backward()
        optimizer.step()
        scheduler.step()
    for each in sparsify.masked_weights(module):
        mine = each.mask.mask.to(torch.uint8)
        both = [torch.zeros_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        if rank == 0:
            print(criterion, each.name, f"{each.mask.sparsity:.1f}", torch.equal(both[0], both[1]))
        assert not each.weight[~each.mask.mask].any()
dist.destroy_process_group()
"""


def test_two_processes_have_equal_masks(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    criteria = ("magnitude", "movement", "random")
    expected = [f"{criterion} module.{layer} 0.8 True" for criterion in criteria for layer in (0, 2)]
    assert torchrun(script).splitlines() == expected


def test_the_example_prints_its_table_and_writes_it(tmp_path: Path) -> None:
    written = tmp_path / "digits.md"
    options = ["--width", "64", "--epochs", "3", "--out", str(written)]
    command = [sys.executable, str(ROOT / "examples" / "sparse_digits.py"), *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    zeros = [row[-5] for row in rows if row and row[-1].endswith("x")]
    assert zeros == ["70.0%", "90.0%", "95.0%", "50.0%", "87.5%"]  # of 16 blocks 14
    assert sum("%" in line for line in written.read_text().splitlines()) == 1 + len(zeros)


def test_options_of_the_pass_become_a_plan() -> None:
    plan = Sparsify(granularity="2:4", schedule="linear", steps=7).plan
    assert (plan.amount, plan.schedule, plan.steps) == (0.5, "linear", 7)
