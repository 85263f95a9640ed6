"""2:4 weights on sparse tensor cores: what is taken and why not on the CPU, the products where there is a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxopt
from fxopt.capture import capture
from fxopt.engines.layer import Layer
from fxopt.engines.lower import build
from fxopt.engines.sparse import Sparse
from fxopt.engines.sparse.kernels import CUDA, tables
from fxopt.engines.sparse.semi_structured import LIBRARIES, is_two_of_four, semi_structured, why_not
from fxopt.errors import EngineError
from fxopt.inputs import Inputs
from fxopt.pipeline import run_passes
from fxopt.spec import parse

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def masked(model: nn.Module, x: Tensor, granularity: str) -> nn.Module:
    captured = capture(model.eval(), (x,))
    run_passes(captured, parse(f"sparsify{{granularity={granularity}}},sparsify-bake"))
    return captured.module


@pytest.mark.parametrize(("granularity", "expected"), [("2:4", True), ("1:4", True), ("4:8", False), ("row", False)])
def test_a_masked_layer_is_recognised(granularity: str, expected: bool) -> None:
    torch.manual_seed(0)
    module = masked(nn.Sequential(nn.Linear(64, 32)), torch.randn(2, 64), granularity)
    assert is_two_of_four(module.get_parameter("0.weight")) is expected


def test_a_row_that_cannot_be_split_in_fours_is_not_two_of_four() -> None:
    assert not is_two_of_four(torch.zeros(8, 6))


REFUSED = [
    ("cusparselt", (64, 64), torch.float16, (7, 5), "compute capability 8.0 or later, this one has 7.5"),
    (
        "cusparselt",
        (64, 64),
        torch.float32,
        (8, 0),
        "float16 and bfloat16, its weight is torch.float32; the pass 'cast'",
    ),
    ("cusparselt", (24, 64), torch.float16, (9, 0), "24 outputs and 64 inputs: 2:4 products of cusparselt need multip"),
    ("cutlass", (48, 64), torch.bfloat16, (8, 6), "cutlass need multiples of 32 outputs and 64 inputs"),
    ("cutlass", (32, 96), torch.bfloat16, (8, 6), "cutlass need multiples of 32 outputs and 64 inputs"),
    ("cutlass", (32, 64), torch.bfloat16, (8, 6), None),
    ("cusparselt", (16, 48), torch.float16, (12, 0), None),
]


@pytest.mark.parametrize(("library", "shape", "dtype", "capability", "reason"), REFUSED)
def test_what_a_library_cannot_take_has_a_reason(
    library: str,
    shape: tuple[int, int],
    dtype: torch.dtype,
    capability: tuple[int, int],
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    found = why_not(library, torch.Size(shape), dtype, capability)
    assert found is None if reason is None else reason in str(found)


def test_a_torch_without_cusparselt_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert why_not("cusparselt", torch.Size((64, 64)), torch.float16, (8, 0)) == "this torch has no cuSPARSELt"
    assert why_not("cutlass", torch.Size((64, 64)), torch.float16, (8, 0)) is None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Libraries that hold weights densely, on a GPU that is the CPU; the names of those that were asked."""
    asked: list[str] = []

    def from_dense(library: str, weight: Tensor) -> Tensor:
        asked.append(library)
        if library == "cutlass":
            raise RuntimeError("only for compute capability 8.x\nException raised from somewhere")
        return weight

    for library, real in LIBRARIES.items():
        form = SimpleNamespace(
            _DTYPE_SHAPE_CONSTRAINTS=real._DTYPE_SHAPE_CONSTRAINTS,
            from_dense=lambda w, name=library: from_dense(name, w),
        )
        monkeypatch.setitem(LIBRARIES, library, form)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return asked


def layer(weight: Tensor) -> Layer:
    node: Any = None
    return Layer(
        node, node, node, None, False, "linear", torch.Size((3, weight.shape[1])), weight, torch.randn(32).half()
    )


def test_the_product_is_that_of_the_weight(gpu: list[str]) -> None:
    weight = masked(nn.Sequential(nn.Linear(64, 32)), torch.randn(2, 64), "2:4").get_parameter("0.weight").half()
    made = layer(weight.detach())
    kernel = CUDA["cusparselt"](made)
    assert kernel is not None
    for shape in ((3, 64), (2, 5, 64), (0, 64)):
        x = torch.randn(shape).half()
        torch.testing.assert_close(kernel(x), nn.functional.linear(x, made.weight, made.bias))
    assert gpu == ["cusparselt"]


def test_a_library_that_was_not_built_for_the_gpu_drops_out(gpu: list[str]) -> None:
    made = layer(torch.zeros(32, 64).half())
    assert CUDA["cutlass"](made) is None
    said = semi_structured("cutlass", made)
    assert said == "cutlass refuses its 2:4 zeros: only for compute capability 8.x"


def test_other_zeros_are_not_asked_for(gpu: list[str]) -> None:
    assert CUDA["cusparselt"](layer(torch.ones(32, 64).half())) is None
    assert not gpu


def test_each_device_has_its_kernels() -> None:
    assert set(tables("cuda")[0]) == {"dense", "smaller", "cusparselt", "cutlass"}
    assert not tables("cuda")[1]
    assert not set(LIBRARIES) & {*tables("cpu")[0], *tables("cpu")[1]}


def test_a_saved_choice_of_a_gpu_is_refused_on_the_cpu() -> None:
    x = torch.randn(2, 64)
    choices = {"kernels": {"_0": "cusparselt"}, "why": ""}
    with pytest.raises(EngineError, match="the choice 'cusparselt' does not fit layer '_0'"):
        build(Sparse(), nn.Sequential(nn.Linear(64, 32)).eval(), Inputs.of((x,)), choices)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2048, 4096), nn.ReLU(), nn.Linear(4096, 2048))
    module = masked(model, torch.randn(2, 2048), "2:4").to("cuda", dtype)
    x = torch.randn(1024, 2048, device="cuda", dtype=dtype)
    executable = fxopt.lower(module, (x,), "sparse")
    assert not executable.reasons or executable.choices["kernels"]
    for given in (x, x[:5], x[:0]):
        torch.testing.assert_close(executable(given), module(given), rtol=1e-2, atol=1e-2)


@on_gpu
def test_on_a_gpu_float32_says_what_to_do() -> None:
    x = torch.randn(64, 512, device="cuda")
    module = masked(nn.Sequential(nn.Linear(512, 512)), x.cpu(), "2:4").cuda()
    reasons = [skip.reason for skip in fxopt.lower(module, (x,), "sparse").reasons]
    assert any("the pass 'cast' changes that" in reason or "compute capability" in reason for reason in reasons)
