"""The engine `sparse` and the sparse linear function: the same numbers as the dense product of the masked weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt.capture import capture
from fxopt.engines import sparse
from fxopt.engines.lower import build
from fxopt.engines.sparse import Indices, Sparse, place, sparse_linear
from fxopt.engines.sparse.gate import plans
from fxopt.engines.sparse.kernels import FIRST, LAST
from fxopt.engines.sparse.layout import to_features_first, to_features_last
from fxopt.errors import EngineError
from fxopt.inputs import Inputs
from fxopt.pipeline import run_passes
from fxopt.relative_error import relative_error
from fxopt.spec import parse

if not torch.backends.mkl.is_available():
    pytest.skip("this torch has no MKL", allow_module_level=True)

sizes = st.integers(1, 40)
shapes = st.lists(st.integers(0, 5), min_size=0, max_size=3)


def zeroed(module: nn.Module, amount: float, block: int = 1) -> nn.Module:
    """Zeros in blocks, a fixed share of them in each weight."""
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.Linear):
                rows, columns = (size // block for size in part.weight.shape)
                kept = (torch.rand(rows, columns) >= amount).repeat_interleave(block, 0).repeat_interleave(block, 1)
                part.weight.mul_(kept)
    return module.eval()


@settings(max_examples=80, deadline=None)
@given(shape=shapes, outputs=sizes, inputs=sizes, amount=st.floats(0, 1), bias=st.booleans(), seed=st.integers(0, 99))
def test_forward_and_backward_are_those_of_the_masked_weight(
    shape: list[int], outputs: int, inputs: int, amount: float, bias: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x = torch.randn(*shape, inputs, requires_grad=True)
    weight = torch.randn(outputs, inputs, requires_grad=True)
    offset = torch.randn(outputs, requires_grad=True) if bias else None
    mask = torch.rand(outputs, inputs) >= amount
    wanted = [value for value in (x, weight, offset) if value is not None]
    found, expected = sparse_linear(x, weight, offset, mask), F.linear(x, weight * mask, offset)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    along = torch.randn_like(expected)
    gradients = torch.autograd.grad(found, wanted, along)
    for one, two in zip(gradients, torch.autograd.grad(expected, wanted, along), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert not gradients[1][~mask].any()


def test_gradients_hold_against_finite_differences() -> None:
    mask = torch.rand(5, 7) > 0.5
    indices = Indices.of(mask)
    given = [torch.randn(3, 7), torch.randn(5, 7), torch.randn(5)]
    arguments = [value.double().requires_grad_() for value in given]
    assert torch.autograd.gradcheck(lambda x, w, b: sparse_linear(x, w, b, indices), arguments)


def test_trains_to_what_dense_training_of_the_mask_gives() -> None:
    torch.manual_seed(0)
    mask, start = torch.rand(8, 12) > 0.7, torch.randn(8, 12)
    data, results = torch.randn(20, 12), []
    for linear in (lambda x, w: sparse_linear(x, w, None, mask), lambda x, w: F.linear(x, w * mask)):
        weight = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([weight], 1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            linear(data, weight).square().sum().backward()
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, features=sizes)
def test_the_layout_goes_there_and_back(shape: list[int], features: int) -> None:
    x = torch.randn(*shape, features)
    assert torch.equal(to_features_last(to_features_first(x), x), x)


@pytest.mark.parametrize("samples", [1, 63, 64, 65, 100, 128, 200])
def test_chunks_have_at_most_64_samples(samples: int) -> None:
    chunks, features, width = to_features_first(torch.randn(samples, 3)).shape
    assert (features, chunks) == (3, -(-samples // 64))
    assert width <= 64


class Mixed(nn.Module):
    """Everything at once: a residual, an activation of its own, one value for two layers, three dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(32, 64)
        self.down = nn.Linear(64, 32)
        self.left = nn.Linear(32, 32, bias=False)
        self.right = nn.Linear(32, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(x)))
        sides = torch.tanh(self.left(x)) * torch.relu(self.right(x))
        return self.head(self.norm(sides)).relu_()


def lowered(model: nn.Module, x: Tensor, names: dict[str, str] | str, spec: str = "") -> nn.Module:
    captured = capture(model, (x,))
    if spec:
        run_passes(captured, parse(spec))
    kernels = names
    if isinstance(names, str):
        layers = [node.name for node in captured.module.graph.nodes if "Linear" in kind(captured.module, node)]
        kernels = dict.fromkeys(layers, names)
    return build(
        Sparse(bfloat16=names == "bfloat16"), captured.module, Inputs.of((x,)), {"kernels": kernels, "why": ""}
    )


def kind(module: Any, node: Any) -> str:
    return type(module.get_submodule(node.target)).__name__ if node.op == "call_module" else ""


@pytest.mark.parametrize("shape", [(1, 32), (5, 32), (70, 32), (3, 7, 32), (2, 3, 40, 32)])
@pytest.mark.parametrize("spec", ["", "clean,fuse"])
@pytest.mark.parametrize("name", [*LAST, *FIRST])
def test_every_kernel_computes_the_layer(name: str, spec: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model, x = zeroed(Mixed(), 0.8, 16), torch.randn(shape)
    with torch.no_grad():
        for layer in (model.up, model.left, model.right, model.down, model.head):
            layer.weight[:, :16] = 0
            layer.weight[0] = 1.0
            layer.weight[:16, 16:] = 0
    if name == "bfloat16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("no instructions for bfloat16")
    executable = lowered(model, x, name, spec)
    tolerance = 0.1 if name == "bfloat16" else 1e-5  # the norm widens what is lost
    with torch.no_grad():
        for given in (x, torch.randn(4, 32) if len(shape) == 2 else torch.randn(2, *shape[1:])):
            assert relative_error(model(given), executable(given)) < tolerance


def test_features_stay_first_through_a_region(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("to_features_first", "to_features_last"):
        plain = getattr(place, name)

        def counted(*given: Tensor, name: str = name, plain: Any = plain) -> Tensor:
            calls.append(name)
            return plain(*given)

        monkeypatch.setattr(place, name, counted)
    layers = [nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh()]
    model, x = zeroed(nn.Sequential(*layers), 0.8), torch.randn(5, 16)
    executable = lowered(model, x, "csr")
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(executable(x), model(x))
    assert calls == ["to_features_first", "to_features_last"]


class Activated(nn.Module):
    """An activation whose argument is read again, one behind an Identity, and one that nothing else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.same = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        same = self.same(y)
        z = self.second(torch.relu(same)) + self.second(torch.tanh(y))
        return self.second(torch.sigmoid(self.second(z))) + y


def test_an_activation_takes_the_memory_of_its_argument_only_where_nothing_else_reads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    for function, plain in list(place._IN_PLACE.items()):
        noted = lambda x, plain=plain: (calls.append(plain.__name__), plain(x))[1]  # noqa: E731
        monkeypatch.setitem(place._IN_PLACE, function, noted)
    model, x = zeroed(Activated(), 0.8), torch.randn(5, 16)
    executable = lowered(model, x, "csr")
    calls.clear()
    with torch.no_grad():
        torch.testing.assert_close(executable(x), model(x))
    assert calls == ["sigmoid_"]


@pytest.mark.parametrize("name", FIRST)
def test_weights_and_batches_may_be_empty(name: str) -> None:
    model, x = nn.Sequential(nn.Linear(32, 16)).eval(), torch.randn(3, 32)
    with torch.no_grad():
        model[0].weight.zero_()
    executable = lowered(model, x, name)
    for batch in (x, x[:0]):
        torch.testing.assert_close(executable(batch), model(batch).detach())


def test_without_mkl_there_are_other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    model, x = zeroed(nn.Sequential(nn.Linear(64, 64)), 0.9), torch.randn(16, 64)
    torch.testing.assert_close(lowered(model, x, "bags")(x), model(x).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(EngineError, match="the choice 'csr' does not fit"):
        lowered(model, x, "csr")


TIMES = {
    "hidden": {"dense": 3.0, "bsr": 9.0, "csr": 2.9, "bags": 2.0, "borders": 1.5},
    "head": {"dense": 1.0, "csr": 1.1, "borders": 0.1},
    "stem": {"dense": 1.0},
}


def test_plans_are_those_that_may_be_fastest_each_once() -> None:
    assert plans(TIMES) == {
        "dense": {"hidden": "dense", "head": "dense", "stem": "dense"},
        "within": {"hidden": "bags", "head": "dense", "stem": "dense"},
        "csr": {"hidden": "csr", "head": "csr", "stem": "dense"},
    }


class Written(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = self.second(y)
        y.add_(1)
        return self.second(y) + z


def test_ways_to_run_a_graph_share_their_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = [], sparse._kernel
    monkeypatch.setattr(sparse, "_kernel", lambda name, layer, key: made.append((key, name)) or real(name, layer, key))
    measured = [{"dense": 1.0, "csr": 0.5}, {"dense": 1.0, "csr": 1.2}]
    monkeypatch.setattr(sparse, "layer_times", lambda found, *_: dict(zip(found.named, measured, strict=True)))
    monkeypatch.setattr(sparse, "run_times", lambda runs, _: {name: 1.0 + (name == "torch") for name in runs})
    model = zeroed(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), 0.9).eval()
    assert set(fxopt.lower(model, torch.randn(4, 32), "sparse").choices["kernels"].values()) <= {"dense", "csr"}
    assert sorted(kernel for _, kernel in made) == ["csr", "csr", "dense", "dense"]


def test_a_value_that_is_written_in_place_is_not_stale() -> None:
    model, x = zeroed(Written(), 0.8), torch.randn(5, 16)
    expected = model(x)
    for name in ("dense", "csr"):
        torch.testing.assert_close(lowered(model, x, name)(x), expected)
    torch.testing.assert_close(fxopt.lower(model, (x,), "sparse")(x), expected)


class Placed(nn.Module):
    """One position for all samples, and a sum whose other side has gone through a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(32, 32)
        self.two = nn.Linear(32, 32)
        self.places = nn.Parameter(torch.randn(1, 5, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x) + self.places
        return torch.relu(self.two(x) + self.one(self.places))


@pytest.mark.parametrize("name", [name for name in (*LAST, *FIRST) if name != "bfloat16"])
def test_what_is_added_is_broadcast_where_batches_differ(name: str) -> None:
    torch.manual_seed(0)
    model, x = zeroed(Placed(), 0.2), torch.randn(3, 5, 32)
    with torch.no_grad():
        for layer in (model.one, model.two):
            layer.weight[:16] = layer.weight[:, :16] = 0
    executable = lowered(model, x[:1], name)
    for rows in (1, 3):
        torch.testing.assert_close(executable(x[:rows]), model(x[:rows]).detach(), rtol=1e-4, atol=1e-5)


def test_masks_count_as_zeros() -> None:
    x = torch.randn(8, 256)
    captured = capture(nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)).eval(), (x,))
    run_passes(captured, parse("sparsify{amount=0.95}"))
    with torch.no_grad():
        captured.module.get_parameter("0.weight").add_(1)  # the mask hides it
        executable = fxopt.lower(captured.module, (x,), "sparse")
        torch.testing.assert_close(executable(x), captured.module(x), rtol=1e-4, atol=1e-5)
    assert executable.choices


def test_a_dense_model_runs_as_torch_runs_it_and_says_so() -> None:
    executable = fxopt.lower(nn.Sequential(nn.Linear(8, 8)).eval(), (torch.randn(2, 8),), "sparse")
    (reason,) = executable.reasons
    assert reason.reason == "it runs as torch runs it: no linear layer has zeros in its weight"


def test_what_is_slower_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxopt.engines.sparse.run_times", lambda runs, _: {n: 1.0 + (n != "torch") for n in runs})
    executable = fxopt.lower(zeroed(nn.Sequential(nn.Linear(64, 64)), 0.9), (torch.randn(2, 64),), "sparse")
    assert not executable.choices["kernels"]
    assert "the graph took 1.00x as long as torch's" in executable.reasons[0].reason


def test_choices_of_other_weights_are_refused() -> None:
    model, x = zeroed(nn.Sequential(nn.Linear(64, 64)), 0.1), torch.randn(2, 64)
    with pytest.raises(EngineError, match="the choice 'csr' does not fit layer '_0'"):
        lowered(model, x, "csr")
