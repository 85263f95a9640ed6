"""Products of eight bits: their logic on the CPU, which has the same operators, and the engine where there is a GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import fxopt
from fxopt import Inputs, spec
from fxopt.engines.cublas import Cublas
from fxopt.engines.shortest import shortest
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.pipeline import replay
from fxopt.relative_error import relative_error

NARROW = "it runs in floats: products take features that are multiples of 8, here they are 32 to 10"


def multiplies_float8_by_rows() -> bool:
    """Whether the CPU has cuBLASLt's product too: torch 2.11 knows one scale for a whole matrix alone."""
    rows, scales = torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(rows, rows.t(), scales, scales.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


by_rows = pytest.mark.skipif(not multiplies_float8_by_rows(), reason="no product of float8 by rows on this CPU")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Block(nn.Module):
    """Linear layers with an activation, an addition, one behind the other, and one that no product takes."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.last = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(x + self.down(torch.relu(self.up(x))))


class Mixed(nn.Module):
    """A convolution before a linear layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 16, 3), nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.conv(x).mean((2, 3)))


def quantised(model: nn.Module, x: torch.Tensor, **options: Any) -> GraphModule:
    """Calibrated on what it is given, and frozen."""
    torch.manual_seed(0)
    text = ",".join(f"{name}={value}" for name, value in options.items())
    passes = spec.parse(f"clean,fuse,qat{{{text}}}" if text else "clean,fuse,qat")
    found = replay(model.eval(), Inputs((x,)), passes)
    found.train()
    found(x)
    return found.eval()


def built(module: nn.Module, x: torch.Tensor, precision: str, **options: Any) -> Any:
    return Cublas(precision=precision, measure=False, **options).build(module, Inputs((x,)), {})  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [(4, 5), (3,), (40,)])
@pytest.mark.parametrize("options", [{}, {"weights": "int4"}, {"activations": "int8"}, {"per_channel": "false"}])
def test_integers_give_what_the_quantised_module_simulates(rows: tuple[int, ...], options: dict[str, str]) -> None:
    x = torch.randn(*rows, 32)
    module = quantised(Block(), x, **options)
    made = built(module, x, "int8")
    assert made.reasons[0].reason == "operators on integers: 2 linear"
    with torch.no_grad():
        for given in (x, torch.randn(7, *x.shape[1:])):
            expected, found = module(given), made.run(given)
            # A few values are the neighbours of those that are simulated, where a sum is rounded otherwise.
            assert (expected - found).abs().median() < 1e-5 and relative_error(expected, found) < 2e-2


def test_what_stays_floats_is_named_with_the_reason() -> None:
    x = torch.randn(2, 3, 6, 6)
    made = built(quantised(Mixed(), x), x, "int8")
    reasons = {skip.where: skip.reason for skip in made.reasons[1:]}
    assert reasons["conv"] == "it runs in floats: cuBLASLt multiplies matrices, and this is a convolution"
    x = torch.randn(4, 32)
    made = built(quantised(Block(), x), x, "int8")
    assert {skip.where: skip.reason for skip in made.reasons[1:]} == {"last": NARROW}


def test_a_module_without_quantisers_has_nothing_for_integers() -> None:
    x = torch.randn(4, 32)
    made = built(replay(Block().eval(), Inputs((x,)), spec.parse("clean")), x, "int8")
    assert [skip.reason for skip in made.reasons] == ["operators on integers: none"]


class Twice(nn.Module):
    """One layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.relu(self.layer(x)))


def test_a_layer_that_is_called_twice_is_chosen_twice() -> None:
    x = torch.randn(4, 32)
    module = quantised(Twice(), x)
    made = built(module, x, "int8")
    assert made.reasons[0].reason == "operators on integers: 2 linear" and len(made.choices) == 2
    with torch.no_grad():
        assert relative_error(module(x), made.run(x)) < 2e-2


def test_an_input_that_is_written_to_after_it_was_quantised_stays_floats() -> None:
    x = torch.randn(4, 32)
    module = quantised(Block(), x)
    graph = module.graph
    rounded = next(node for node in graph.nodes if node.target == "up").args[0]
    with graph.inserting_after(rounded):
        graph.call_method("mul_", (rounded.args[0], 0.0))
    module.recompile()
    given = x.clone()
    made = built(module, given, "int8")
    reason = "it runs in floats: what it multiplies is written to after it was quantised"
    assert {skip.where: skip.reason for skip in made.reasons[1:]} == {"up": reason, "last": NARROW}
    with torch.no_grad():
        assert relative_error(module(x.clone()), made.run(x.clone())) < 2e-2


@by_rows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_float8_is_near_the_floats_and_keeps_the_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 32, dtype=dtype)
    module = replay(Block().to(dtype).eval(), Inputs((x,)), spec.parse("clean,fuse"))
    made = built(module, x, "fp8")
    assert made.reasons[0].reason == "linear layers in float8: 2"
    with torch.no_grad():
        found = made.run(x)
        assert found.dtype is dtype
        error = relative_error(module(x).float(), found.float())
    assert 1e-4 < error < Cublas(precision="fp8").tolerance(dtype)


@by_rows
def test_rows_of_zeros_and_large_values_stay_finite_in_float8() -> None:
    x = torch.randn(4, 32) * torch.tensor([0.0, 1e-20, 1.0, 1e20]).unsqueeze(1)
    module = replay(Block().eval(), Inputs((x,)), spec.parse("clean"))
    with torch.no_grad():
        found, expected = built(module, x, "fp8").run(x), module(x)
    assert found.isfinite().all()
    assert ((found - expected).norm(dim=1) < 0.2 * expected.norm(dim=1)).all()


def test_a_layer_stays_as_it_is_where_eight_bits_are_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 32)
    module = quantised(Block(), x)
    times = iter([{"torch": 1.0, "8": 2.0}, {"torch": 1.0, "8": 0.5}])
    monkeypatch.setattr("fxopt.engines.cublas.shortest", lambda calls, seconds: shortest(calls, 0) and next(times))
    made = Cublas().build(module, Inputs((x,)), {})
    assert [skip.reason for skip in made.reasons] == [
        "operators on integers: 1 linear",
        "it runs in floats: measured, int8 took 2.00x as long as floats",
        NARROW,
    ]
    again = Cublas().build(module, Inputs((x,)), made.choices)
    assert again.reasons == made.reasons
    with torch.no_grad():
        assert torch.equal(again.run(x), made.run(x))


def test_what_the_library_refuses_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> Any:
        raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED\nmore")

    monkeypatch.setattr(torch, "_int_mm", refuses)
    x = torch.randn(4, 32)
    reasons = {skip.reason for skip in built(quantised(Block(), x), x, "int8").reasons[1:]}
    assert reasons == {NARROW, "it runs in floats: cuBLASLt refuses it: CUDA error: CUBLAS_STATUS_NOT_SUPPORTED"}


@pytest.mark.parametrize(("precision", "needed"), [("int8", "7.5"), ("fp8", "8.9")])
def test_an_older_gpu_is_refused(precision: str, needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    with pytest.raises(
        EngineError, match=re.escape(f"need a GPU of compute capability {needed}, and this one has 7.0")
    ):
        fxopt.lower(nn.Linear(2, 2).eval(), torch.randn(1, 2), "cublas", precision=precision)


def test_other_precisions_are_refused() -> None:
    with pytest.raises(EngineError, match="precision is 'int8' or 'fp8', not 'int4'"):
        Cublas(precision="int4")  # type: ignore[arg-type]


@on_gpu
@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_on_a_gpu(precision: str) -> None:
    x = torch.randn(64, 32)
    module = quantised(Block(), x) if precision == "int8" else replay(Block().eval(), Inputs((x,)), ())
    module, x = module.cuda(), x.cuda()
    executable = fxopt.lower(module, x, "cublas", precision=precision, measure=False)
    assert executable.reasons[0].reason.endswith("2" if precision == "fp8" else "2 linear")
    with torch.no_grad():
        allowed = 1e-4 if precision == "int8" else 0.2
        assert relative_error(module(x), executable(x)) < allowed
        fresh = torch.randn(5, 32, device="cuda")
        assert relative_error(module(fresh), executable(fresh)) < max(allowed, 2e-2)
