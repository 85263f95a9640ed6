"""Two processes train a captured module as they train the original."""

from __future__ import annotations

import socket
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fxopt import optimize
from fxopt.capture import capture
from tests.models import DYNAMIC, STATIC, Case

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")


def losses(module: nn.Module, case: Case, rank: int) -> list[float]:
    """Three steps, each process on inputs of its own."""
    parallel = DistributedDataParallel(module.train(), find_unused_parameters=True)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05)
    result = []
    for step in range(3):
        torch.manual_seed(step)
        output = parallel(*case.example(10 * step + rank))
        loss = (output[0] if isinstance(output, tuple) else output).float().pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.append(loss.item())
    return result


def quantized() -> nn.Module:
    """A captured network that has quantisers to train with."""
    case = STATIC["deep_glu"]
    return optimize(case.build(), case.example(), "qat", devices=(), seed=0).module


def losses_of_both(module: nn.Module, case: Case) -> list[float]:
    """The same three steps in one process, on the inputs of both."""
    module.train()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    result = []
    for step in range(3):
        (left,), (right,) = case.example(10 * step), case.example(10 * step + 1)
        loss = module(torch.cat((left, right))).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        result.append(loss.item())
    return result


def train(rank: int, port: int, names: list[str], results: dict[str, list[list[float]]]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        for name in names:
            case = {**STATIC, **DYNAMIC}[name]
            captured = capture(case.build().train(), case.example(), case.kwargs).module
            results[f"{name} {rank}"] = [losses(case.build(), case, rank), losses(captured, case, rank)]
        results[f"quantized {rank}"] = losses(quantized(), STATIC["deep_glu"], rank)
    finally:
        dist.destroy_process_group()


def test_two_processes_train_to_the_same_losses():
    names = ["staged_cnn", "mixture", "learnable_dropout"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = mp.get_context("spawn").Manager().dict()
    mp.spawn(train, (port, names, results), nprocs=2)
    halves = [results.pop(f"quantized {rank}") for rank in range(2)]
    both = losses_of_both(quantized(), STATIC["deep_glu"])
    assert [sum(pair) / 2 for pair in zip(*halves, strict=True)] == pytest.approx(both, rel=1e-5)
    assert both[0] != both[2]
    assert len(results) == 2 * len(names)
    for name, (original, captured) in results.items():
        assert original == captured, name
        assert original[0] != original[2], name
