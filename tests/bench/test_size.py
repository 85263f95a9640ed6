from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from fxopt.bench import Size, compare, measure_size
from fxopt.bench.size import state_bytes
from fxopt.errors import EngineError


class Chain(nn.Module):
    """Holds two of its three steps at a time."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = x + 1
        return x


class Views(nn.Module):
    """Makes one new tensor and many views of it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        return y.view(-1)[1:].reshape(1, -1).add_(1)


@pytest.mark.parametrize(
    ("module", "shape", "expected"),
    [
        pytest.param(nn.Linear(4, 5), (2, 4), Size(25, 0, 100, 2 * 2 * 4 * 5, 40), id="linear"),
        pytest.param(nn.Identity(), (2, 4), Size(0, 0, 0, 0, 0), id="nothing"),
        pytest.param(Chain(), (256,), Size(0, 0, 0, 0, 2048), id="what is freed counts no more"),
        pytest.param(Views(), (256,), Size(0, 0, 0, 0, 1024), id="views and in-place calls hold nothing new"),
        pytest.param(nn.Conv2d(3, 8, 3, bias=False), (1, 3, 6, 6), Size(216, 0, 864, 2 * 216 * 16, 512), id="conv"),
        pytest.param(nn.BatchNorm1d(3).eval(), (2, 3), Size(6, 7, 24 + 32, 0, 24), id="buffers"),
    ],
)
def test_size(module: nn.Module, shape: tuple[int, ...], expected: Size) -> None:
    assert measure_size(module, torch.zeros(shape)) == expected


def test_attention_counts_on_the_cpu_too() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, batch_first=True).eval()
    projections, attention, forward = 10 * 16 * 64 * 2, 2 * 10 * 10 * 16 * 2, 10 * 16 * 32 * 2 * 2
    found = measure_size(layer, torch.zeros(1, 10, 16))
    assert found.flops == projections + attention + forward
    assert found.peak_memory > 10 * 16 * 4
    assert torch.backends.mha.get_fastpath_enabled()


def test_shared_memory_counts_once() -> None:
    tied = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    tied[1].weight = tied[0].weight
    assert state_bytes(tied) == 256
    viewed = nn.Module()
    viewed.whole = nn.Parameter(torch.zeros(8, 8))
    viewed.register_buffer("transposed", viewed.whole.detach().t())
    viewed.register_buffer("row", viewed.whole.detach()[3])
    assert state_bytes(viewed) == 256


def test_a_slice_counts_as_the_slice() -> None:
    module = nn.Module()
    module.register_buffer("row", torch.zeros(100, 8)[3])
    assert state_bytes(module) == 32


def test_sparse_memory_counts_what_is_stored() -> None:
    module = nn.Module()
    module.register_buffer("sparse", torch.eye(100).to_sparse_coo())
    assert state_bytes(module) == 100 * (2 * 8 + 4)


def test_lazy_parameters_have_the_size_that_a_call_gives_them() -> None:
    lazy = nn.LazyLinear(4)
    assert measure_size(lazy, torch.zeros(1, 3)) == measure_size(nn.Linear(3, 4), torch.zeros(1, 3))
    assert lazy.has_uninitialized_params()


def weight_normalised() -> nn.Module:
    return torch.nn.utils.weight_norm(nn.Linear(3, 3))  # `copy.deepcopy` refuses the weight that it computes


def locked() -> nn.Module:
    module = nn.Linear(3, 3)
    module.lock = threading.Lock()  # type: ignore[assignment]
    return module


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("layer", [nn.Identity, weight_normalised, locked])
def test_the_module_is_left_alone(layer: Callable[[], nn.Module]) -> None:
    module = nn.Sequential(layer(), nn.BatchNorm1d(3)).train()
    measure_size(module, torch.randn(4, 3))
    assert module.training
    assert module[1].num_batches_tracked == 0


def test_a_module_that_raises() -> None:
    with pytest.raises(EngineError, match=r"'module' \(Linear\) raised RuntimeError .* with inputs 1x3 float32"):
        measure_size(nn.Linear(4, 4), torch.zeros(1, 3))


def test_a_module_that_needs_gradients_is_told_to_ask_for_them() -> None:
    class Slope(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.detach().requires_grad_()
            return torch.autograd.grad(x.pow(2).sum(), x)[0]

    with pytest.raises(EngineError, match=r"without gradients: compute them within `torch.enable_grad\(\)`"):
        measure_size(Slope().eval(), torch.ones(2))


class Shy(nn.Module):
    """Raises where its operators are watched."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise RuntimeError("watched")
        return x


def test_what_refuses_to_be_watched_has_no_numbers() -> None:
    assert measure_size(Shy(), torch.zeros(1)) == Size(0, 0, 0, None, None)
    assert compare(Shy(), Shy(), torch.zeros(1), pairs=2, budget_seconds=0.01).peak_memory.before is None


def test_flops_are_the_same_in_inference_mode() -> None:
    class Inference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        @torch.inference_mode()
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.matmul(self.layer(x).mT, x)

    assert measure_size(Inference(), torch.ones(2, 4, 4)).flops == 2 * (2 * 4 * 4 * 3 + 2 * 4 * 3 * 4)
