"""The engines for CUDA: their logic with stand-ins on the CPU, and the real thing where there is a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt import Inputs, spec
from fxopt.engines.cudagraph import CudaGraph
from fxopt.engines.cudnn import CuDNN
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.pipeline import replay
from tests.engines.test_contract import agree
from tests.models import STATIC

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def fused(name: str) -> tuple[nn.Module, GraphModule, tuple[torch.Tensor, ...]]:
    case = STATIC[name]
    model, example = case.build(), case.example()
    return model, replay(model, Inputs(example), spec.parse("clean,fuse")), example


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """cuDNN's operators, computed on the CPU; the names of those that are called."""
    made: list[str] = []

    def relu(x: Any, w: Any, b: Any, stride: Any, padding: Any, dilation: Any, groups: int) -> torch.Tensor:
        made.append("relu")
        return F.relu(F.conv2d(x, w, b, stride, padding, dilation, groups))

    def add_relu(x: Any, w: Any, z: Any, alpha: float, b: Any, *geometry: Any) -> torch.Tensor:
        made.append("add_relu")
        assert alpha == 1
        return F.relu(F.conv2d(x, w, b, *geometry) + z)

    monkeypatch.setattr(torch, "cudnn_convolution_relu", relu)
    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    return made


def test_cudnn_fuses_what_it_can_and_says_what_it_cannot(calls: list[str]) -> None:
    model, module, example = fused("staged_cnn")
    built = CuDNN().build(module, Inputs(example), {})
    with torch.no_grad():
        agree(built.run(*example), model(*example))
    assert calls.count("add_relu") == 2
    assert calls.count("relu") >= 4
    reasons = {skip.reason for skip in built.reasons}
    assert "cuDNN fuses a ReLU behind a convolution, here is none" in reasons
    assert any("this is 'linear'" in reason for reason in reasons)


def test_cudnn_keeps_float32_unless_asked(calls: list[str]) -> None:
    _, module, example = fused("conv_block")
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    for tf32 in (False, True):
        engine = CuDNN(tf32=tf32)
        built = engine.build(module, Inputs(example), {})
        built.run(*example)
        assert (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == before
        assert engine.tolerance(torch.float32) == (5e-3 if tf32 else 1e-4)


class Recording:
    """A CUDA graph that only counts."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Recording]:
    made: list[Recording] = []

    def new() -> Recording:
        made.append(Recording())
        return made[-1]

    @contextlib.contextmanager
    def entered(_: Any) -> Iterator[None]:
        yield

    stream = SimpleNamespace(wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", new)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "graph", entered)
    return made


def test_a_cuda_graph_is_replayed_on_its_own_tensors(graphs: list[Recording]) -> None:
    model, module, example = fused("simple_net")
    built = CudaGraph(around="eager").build(module, Inputs(example), {})
    with torch.no_grad():
        one, two = built.run(*example), built.run(*example)
        agree(one, model(*example))
    assert graphs[0].replays == 2
    assert one.data_ptr() != two.data_ptr(), "a later call leaves an output as it is"


def test_a_forward_that_waits_cannot_be_recorded(graphs: list[Recording]) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    _, module, example = fused("simple_net")
    module.forward = fails  # type: ignore[method-assign]
    with pytest.raises(EngineError, match=r"cannot record 'eager'.*\.item\(\)"):
        CudaGraph(around="eager").build(module, Inputs(example), {})


def test_wrong_options() -> None:
    with pytest.raises(EngineError, match="around is 'eager', 'cudnn' or 'inductor', not 'onednn'"):
        CudaGraph(around="onednn")  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("engine", ["cudnn", "cudagraph"])
def test_without_a_gpu_they_say_so(engine: str) -> None:
    with pytest.raises(EngineError, match="there is no CUDA device"):
        fxopt.lower(nn.Linear(2, 2).eval(), torch.randn(1, 2), engine)


@on_gpu
@pytest.mark.parametrize("engine", ["eager", "cudnn", "cudagraph"])
@pytest.mark.parametrize("name", ["staged_cnn", "simple_net", "encoder"])
def test_on_a_gpu(name: str, engine: str) -> None:
    model, module, example = fused(name)
    model, module = model.cuda(), module.cuda()
    given = tuple(value.cuda() for value in example)
    executable = fxopt.lower(module, given, engine)
    with torch.no_grad():
        agree(executable(*given), model(*given), 1e-4)
        fresh = tuple(torch.randn_like(value) for value in given)
        agree(executable(*fresh), model(*fresh), 1e-4)
