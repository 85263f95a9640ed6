"""oneDNN's kernels against torch's: every way to compute every kind of layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt import Inputs, spec
from fxopt.engines import onednn
from fxopt.engines.layer import Layer
from fxopt.engines.layers import Layers
from fxopt.engines.onednn import OneDNN, kernels, tune
from fxopt.engines.onednn.kernels import KERNELS, Kernel
from fxopt.errors import EngineError
from fxopt.pipeline import replay
from fxopt.relative_error import relative_error

pytestmark = pytest.mark.skipif(OneDNN().unavailable() is not None, reason="this torch has no oneDNN")


class Columns(nn.Module):
    """A product with a weight whose columns are the outputs, as GPT-2's layers hold it."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 8))
        self.bias = nn.Parameter(torch.randn(8)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight if self.bias is None else torch.addmm(self.bias, x, self.weight)


class ByHand(Columns):
    """The same with an addition of its own, and that in place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__(bias=True)
        self.in_place = in_place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight
        if not self.in_place:
            return self.bias + y
        y += self.bias
        return y


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 8), (3, 12)),
    "linear without bias": (lambda: nn.Linear(12, 8, bias=False), (3, 12)),
    "linear on sequences": (lambda: nn.Linear(12, 8), (2, 5, 12)),
    "addmm": (lambda: Columns(bias=True), (3, 12)),
    "matmul and bias on sequences": (lambda: ByHand(in_place=False), (2, 5, 12)),
    "matmul and bias in place": (lambda: ByHand(in_place=True), (3, 12)),
    "matmul on sequences": (lambda: Columns(bias=False), (2, 5, 12)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv1d, strided and grouped": (lambda: nn.Conv1d(4, 6, 3, 2, 2, 2, groups=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 9, 8)),
    "conv2d without bias": (lambda: nn.Conv2d(4, 6, 3, bias=False), (2, 4, 9, 8)),
    "conv2d, odd geometry": (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2)), (2, 4, 9, 8)),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 8)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (2, 4, 9, 8)),
    "conv2d, same": (lambda: nn.Conv2d(4, 6, (3, 5), padding="same", dilation=(2, 1)), (2, 4, 9, 8)),
    "conv2d, valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 9, 8)),
    "conv2d, 1x1": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 9, 8)),
    "conv2d, 1x1 without bias": (lambda: nn.Conv2d(4, 6, 1, bias=False), (2, 4, 9, 8)),
    "conv2d, 1x1 strided": (lambda: nn.Conv2d(4, 6, 1, (2, 3)), (2, 4, 9, 8)),
    "conv2d on one place": (lambda: nn.Conv2d(4, 6, 1), (2, 4, 1, 1)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 3, padding=1), (2, 2, 5, 4, 6)),
    "conv3d, 1x1": (lambda: nn.Conv3d(2, 3, 1), (2, 2, 5, 4, 6)),
    "transposed 2d": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, 1), (2, 4, 5, 6)),
    "transposed 2d, grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, 2, groups=2, dilation=2), (2, 4, 5, 6)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(2, 3, 2, 2), (2, 2, 3, 4, 5)),
}
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "none": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "hardtanh": lambda: nn.Hardtanh(-0.3, 0.4),
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu by tanh": lambda: nn.GELU("tanh"),
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


class Tailed(nn.Module):
    """act(layer(x)), or act(layer(x) + y)."""

    def __init__(self, layer: nn.Module, activation: nn.Module):
        super().__init__()
        self.layer = layer
        self.activation = activation

    def forward(self, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
        out = self.layer(x)
        return self.activation(out if y is None else out + y)


class AddsFresh(nn.Module):
    """The other operand is a value that nothing else sees, so its memory may be taken."""

    def __init__(self, layer: nn.Module, activation: nn.Module):
        super().__init__()
        self.layer = layer
        self.activation = activation

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.activation(self.layer(x) + torch.exp(y))


def force(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute every layer by one kernel where it applies, in channels_last, without measuring."""

    def choose(layers: Any, budget: float) -> list[str]:
        return [kernel if KERNELS[kernel](layer) is not None else "packed" for layer in layers]

    monkeypatch.setattr(onednn, "choose", choose)
    monkeypatch.setattr(onednn, "_time", lambda runs, inputs: {"as given": 2.0, "channels_last": 1.0})


def lowered(model: nn.Module, *inputs: torch.Tensor) -> fxopt.Executable:
    return fxopt.lower(replay(model, Inputs(inputs), spec.parse("clean,fuse")), inputs, "onednn")


def assert_runs_alike(
    executable: fxopt.Executable, model: nn.Module, *inputs: torch.Tensor, tolerance: float = 1e-5
) -> None:
    with torch.no_grad():
        expected = model(*(value.clone() for value in inputs))
        found = executable(*inputs)
    assert found.shape == expected.shape
    assert found.dtype is expected.dtype
    assert found.is_contiguous() or not expected.is_contiguous()
    assert relative_error(expected.double(), found.double()) <= tolerance


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", LAYERS)
def test_every_kernel_of_every_layer(name: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(kernel, monkeypatch)
    torch.manual_seed(0)
    factory, shape = LAYERS[name]
    model, x = factory().eval(), torch.randn(*shape)
    executable = lowered(model, x)
    assert not executable.reasons and len(executable.choices["kernels"]) == 1
    assert_runs_alike(executable, model, x)
    assert_runs_alike(executable, model, torch.randn(5, *shape[1:]))
    assert_runs_alike(executable, model, torch.randn(0, *shape[1:]))


BIASED = ["linear", "addmm", "matmul and bias in place", "conv1d", "conv2d", "conv2d, 1x1", "conv3d", "transposed 2d"]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", BIASED)
def test_parameters_may_be_parts_of_larger_tensors(name: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(kernel, monkeypatch)
    factory, shape = LAYERS[name]
    model, x = factory().eval(), torch.randn(*shape)
    for leaf, parameter in list(model.named_parameters()):
        setattr(model, leaf, nn.Parameter(torch.stack([parameter.detach(), torch.randn(parameter.shape)], -1)[..., 0]))
    assert_runs_alike(fxopt.lower(model, x, "onednn"), model, x)


@pytest.mark.parametrize("kernel", ["packed", "mkl", "plain"])
@pytest.mark.parametrize("layer", ["linear", "conv1d", "conv2d", "conv2d, 1x1", "transposed 2d"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, layer: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(kernel, monkeypatch)
    torch.manual_seed(0)
    factory, shape = LAYERS[layer]
    model, x = Tailed(factory(), ACTIVATIONS[activation]()).eval(), torch.randn(*shape)
    assert_runs_alike(lowered(model, x), model, x)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("form", [Tailed, AddsFresh])
@pytest.mark.parametrize(
    "layer", ["linear", "addmm", "conv1d", "conv2d", "conv2d, grouped", "conv2d, 1x1", "transposed 2d"]
)
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_every_addition(
    activation: str, layer: str, form: type[nn.Module], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(kernel, monkeypatch)
    torch.manual_seed(0)
    factory, shape = LAYERS[layer]
    model, x = form(factory(), ACTIVATIONS[activation]()).eval(), torch.randn(*shape)
    y = torch.randn_like(model.layer(x).detach())
    executable = lowered(model, x, y)
    assert len(executable.choices["kernels"]) == 1
    before = y.clone()
    assert_runs_alike(executable, model, x, y)
    assert torch.equal(y, before), "an input is never written"


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("form", [Tailed, AddsFresh])
@pytest.mark.parametrize("layer", ["linear on sequences", "conv1d", "conv2d, odd geometry", "conv2d, 1x1 strided"])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
def test_what_is_added_is_broadcast_where_batches_differ(
    activation: str, layer: str, form: type[nn.Module], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    force(kernel, monkeypatch)
    torch.manual_seed(0)
    factory, shape = LAYERS[layer]
    model, x = form(factory(), ACTIVATIONS[activation]()).eval(), torch.randn(3, *shape[1:])
    y = torch.randn_like(model.layer(x).detach())
    executable = lowered(model, x[:1], y[:1])
    for rows, added in ((3, 1), (1, 3), (3, 3)):
        assert_runs_alike(executable, model, x[:rows], y[:added])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("layer", ["linear", "conv2d", "conv2d, 1x1"])
def test_bfloat16(layer: str, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(kernel, monkeypatch)
    torch.manual_seed(0)
    factory, shape = LAYERS[layer]
    model, x = Tailed(factory(), nn.ReLU()).eval().bfloat16(), torch.randn(*shape).bfloat16()
    assert_runs_alike(lowered(model, x), model, x, tolerance=2e-2)


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="oneDNN has no kernels for bfloat16 on this CPU"
)
def test_layers_in_bfloat16_between_values_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    force("packed", monkeypatch)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3)).eval(), torch.randn(2, 4, 9, 8)
    cast = replay(model, Inputs((x,)), spec.parse("clean,fuse,cast"))
    executable = fxopt.lower(cast, x, "onednn")
    assert not executable.reasons
    assert_runs_alike(executable, model, x, tolerance=2e-2)


@pytest.mark.parametrize("kernel", KERNELS)
def test_building_makes_no_second_copy_of_plain_weights(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(kernel, monkeypatch)
    layers = [nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.ConvTranspose2d(4, 4, 1), nn.Flatten()]
    model, x = nn.Sequential(*layers, nn.Linear(100, 2)).eval(), torch.randn(1, 4, 5, 5)
    executable = fxopt.lower(model, x)
    assert {skip.where for skip in executable.reasons} == set()
    weights = {name: weight for name, weight in executable.module.named_parameters() if weight.dim() > 1}
    assert len(weights) == 4
    assert all(torch._C._is_cow_tensor(weight) for weight in weights.values())


@pytest.mark.parametrize("shape", [(3, 8), (3, 1), (1,)], ids=str)
def test_a_sum_that_is_no_bias_stays_as_it_is(shape: tuple[int, ...]) -> None:
    model, x = Columns(bias=True).eval(), torch.randn(3, 12)
    model.bias = nn.Parameter(torch.randn(shape))
    executable = lowered(model, x)
    assert [skip.reason for skip in executable.reasons] == ["what it adds is not a parameter with a number an output"]
    assert_runs_alike(executable, model, x)


class Adapting(nn.Module):
    """Moves the weights of a layer and of a function once it has called them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.weight = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.linear(self.layer(x), self.weight)
        self.layer.weight.data.add_(0.5)
        with torch.no_grad():
            self.weight.mul_(2)
        return y


def test_a_weight_that_the_graph_writes_is_not_packed() -> None:
    model, x = Adapting().eval(), torch.randn(4, 8)
    executable = fxopt.lower(model, x, "onednn", tune_seconds=0.0)
    assert [skip.reason for skip in executable.reasons] == ["the graph writes into its parameters"] * 2
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(executable(x), model(x))


class Meeting(nn.Module):
    """Two layers that meet in an addition without an activation, whose sum is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(3, 4, 3, padding=1)
        self.two = nn.Conv2d(3, 4, 1)
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x) + self.two(x)
        return self.last(y) + y


class Viewed(nn.Module):
    """`view` behind a convolution, and channels counted by another `view`."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        y = y.view(y.shape[0], 2, 4, -1).transpose(1, 2)
        return y.reshape(y.shape[0], -1)


class Hidden(nn.Module):
    """Python that no graph shows, around a layer, and with a `view` of what the layer gave."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        if y.sum().item() > 1e9:
            return y
        return y.view(y.shape[0], -1)


class WritesInput(nn.Module):
    """The input of the convolution is written before what could be computed with it, so it can't wait for that."""

    def __init__(self, last: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch.add) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1
        y = self.conv(x)
        x.mul_(2)
        return self.last(y, x)


WritesInputOfGate = partial(WritesInput, lambda y, x: F.hardsigmoid(y) * x)


class AddsInto(nn.Module):
    """`y += x` into an input, which the caller sees."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x += self.conv(x)
        return x * 2


class AddsItsInput(nn.Module):
    """`fuse` makes one node of the second layer and the addition, which alone uses what the first layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.one(x)
        return F.relu(self.two(x) + x)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("form", [Meeting, Viewed, Hidden, WritesInput, WritesInputOfGate, AddsInto, AddsItsInput])
def test_odd_graphs(form: type[nn.Module], kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force(kernel, monkeypatch)
    torch.manual_seed(0)
    model = form().eval()
    x = torch.randn(2, 3 if form is Meeting else 4, 6, 5)
    executable = lowered(model, x)
    assert_runs_alike(executable, model, x.clone())
    with torch.no_grad():
        one, two = x.clone(), x.clone()
        executable(one), model(two)
    assert relative_error(two, one) < 1e-6


VIEWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "view": lambda y: y.view(-1),
    "reshape": lambda y: y.reshape(2, -1),
    "flatten": lambda y: torch.flatten(y, 1),
    "contiguous": lambda y: y.contiguous(),
}


class Written(nn.Module):
    """A view of what one convolution gave is written; another's output is only read."""

    def __init__(self, view: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.view = view
        self.written = nn.Conv2d(4, 4, 3)
        self.read = nn.Conv2d(4, 4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, z = self.written(x), self.read(x)
        self.view(y).mul_(2)
        z.mul_(2)
        return y, self.view(z)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_that_is_written_keeps_its_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    force("packed", monkeypatch)
    model, x = Written(VIEWS[name]).eval(), torch.randn(2, 4, 6, 6)
    executable = fxopt.lower(model, x)
    with torch.no_grad():
        for found, expected in zip(executable(x), model(x), strict=True):
            assert relative_error(expected, found) < 1e-5
    assert [skip.where for skip in executable.reasons] == ["written"]
    assert "is a view of memory that is written" in executable.reasons[0].reason


def test_what_looks_at_strides_behind_a_layer_that_forgets_them_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Patches(nn.Module):
        """As in a windowed transformer: patches, a norm, and a mask that is filled part by part."""

        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 2, 2)
            self.norm = nn.LayerNorm(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.patches(x).permute(0, 2, 3, 1))
            mask = x.new_zeros((x.shape[1], x.shape[2]))
            mask.view(-1)[1:] = 1
            windows = x.view(x.shape[0], -1, 8)
            windows += mask.view(-1, 1)
            return x

    force("packed", monkeypatch)
    model, x = Patches().eval(), torch.randn(2, 3, 6, 6)
    executable = fxopt.lower(model, x)
    assert not executable.reasons
    assert executable.choices["layout"] == "channels_last"
    assert_runs_alike(executable, model, x)


def test_a_dropout_that_is_told_of_evaluation_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    class Frames(nn.Module):
        """As the front of a speech encoder."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.dropout(F.gelu(self.conv(x)).transpose(1, 2), 0.5, training=self.training)

    force("packed", monkeypatch)
    model, x = Frames().eval(), torch.randn(2, 4, 16)
    executable = fxopt.lower(model, x)
    assert not executable.reasons
    assert_runs_alike(executable, model, x)


class Narrowed(nn.Module):
    """Runs a layer of float32 in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.linear(x)


class Force(nn.Module):
    """The slope of an energy that a layer computes."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).square().sum(), x)[0]


REFUSED: dict[str, tuple[Callable[[], nn.Module], torch.Tensor, str]] = {
    "double": (lambda: nn.Linear(3, 2).double(), torch.randn(2, 3).double(), "no kernels for torch.float64"),
    "circular": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        torch.randn(1, 3, 5, 5),
        "it pads by 'circular'",
    ),
    "uneven": (lambda: nn.Conv2d(3, 4, 2, padding="same"), torch.randn(1, 3, 5, 5), "not the same on both sides"),
    "unbatched": (lambda: nn.Conv2d(3, 4, 3), torch.randn(3, 5, 5), "no batch dimension"),
    "a vector": (lambda: nn.Linear(3, 2), torch.randn(3), "one dimension"),
    "transposed 1d": (
        lambda: nn.ConvTranspose1d(3, 2, 2),
        torch.randn(1, 3, 5),
        "one-dimensional transposed",
    ),
    "within autocast": (Narrowed, torch.randn(2, 16), "its output is torch.bfloat16, its weight torch.float32"),
    "a gradient": (Force, torch.randn(2, 3), "the forward computes gradients through it"),
    "a batch norm": (lambda: nn.BatchNorm2d(3), torch.randn(1, 3, 5, 5), "the pass 'fuse' folds it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_as_it_is_says_why(name: str) -> None:
    factory, x, reason = REFUSED[name]
    model = nn.Sequential(factory()).eval()
    executable = fxopt.lower(model, x)
    assert [skip.where.split(".")[0] for skip in executable.reasons] == ["0"]
    assert reason in executable.reasons[0].reason
    assert_runs_alike(executable, model, x)


def test_a_graph_that_is_slower_packed_stays_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_time", lambda runs, inputs: {"as given": 1.0, "channels_last": 2.0})
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2)).eval(), torch.randn(1, 3, 5, 5)
    executable = fxopt.lower(model, x)
    assert executable.choices["layout"] == "as given"
    assert "packed, the graph took 2.00x as long" in executable.reasons[0].reason
    assert_runs_alike(executable, model, x)


@pytest.mark.parametrize(
    ("seconds", "order"),
    [(0.0, ["given", "packed"]), (60.0, [*3 * ["given"], *6 * ["packed"], *3 * ["given"]])],
    ids=["slow", "fast"],
)
def test_a_graph_is_held_against_torchs_there_and_back_while_there_is_time(
    seconds: float, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "_WHOLE_SECONDS", seconds)
    called: list[str] = []
    runs = {name: partial(lambda name, x: called.append(name), name) for name in ("given", "packed")}
    times = onednn._time(runs, Inputs.of(torch.zeros(1)))
    assert min(times.values()) > 0
    assert called == order


def test_the_largest_weight_is_packed_first_so_that_smaller_ones_fit_into_the_holes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes: list[int] = []
    make = onednn._kernel
    monkeypatch.setattr(onednn, "_kernel", lambda layer, name: sizes.append(layer.weight.nbytes) or make(layer, name))
    fxopt.lower(nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 16), nn.Linear(16, 2)).eval(), torch.randn(3, 4))
    assert sizes == [4 * 9 * 16, 4 * 4 * 9, 4 * 16 * 2]


@pytest.mark.parametrize(
    ("products", "only", "rows"),
    [(5e10, None, [8]), (2e11, None, [2]), (9e11, None, [1]), (2e11, 8, [2, 8])],
    ids=["fast", "slow", "slower than all rows", "slow and of a fixed batch"],
)
def test_a_slow_graph_is_held_against_torchs_on_a_part_of_its_batch(
    products: float, only: int | None, rows: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "_WHOLE_SECONDS", 0.0)
    given = []

    def run(x: torch.Tensor) -> None:
        given.append(len(x))
        if only not in (None, len(x)):
            raise RuntimeError("another batch")

    assert list(onednn._time_shortly({"as given": run}, Inputs.of(torch.zeros(8, 1)), int(products))) == ["as given"]
    assert given == rows


def test_a_slow_graph_without_a_batch_is_held_against_torchs_on_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_WHOLE_SECONDS", 0.0)
    given = []
    onednn._time_shortly({"as given": given.append}, Inputs.of(torch.zeros(())), 9 * 10**11)
    assert [x.shape for x in given] == [torch.Size()]


def test_a_large_layer_is_tried_on_a_part_of_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.small(self.large(x) + x)

    tried: dict[int, set[int]] = {4: set(), 2: set()}

    def packed(layer: Layer) -> Kernel:
        tried[len(layer.weight)].add(layer.shape[0])
        return kernels.packed(layer)

    monkeypatch.setattr(tune, "KERNELS", {"packed": packed})
    # Of products the first layer has 4 * 4 * 9 * 64 in each row, the second 4 * 2 * 64.
    monkeypatch.setattr(tune, "_MOST_PRODUCTS", 2 * 4 * 4 * 9 * 64)
    model, x = Residual().eval(), torch.randn(6, 4, 8, 8)
    assert_runs_alike(fxopt.lower(model, x), model, x)
    assert tried == {4: {2}, 2: {6}}


def test_without_tuning_everything_is_packed() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2)).eval(), torch.randn(1, 3, 5, 5)
    executable = fxopt.lower(model, x, tune_seconds=0.0)
    assert executable.choices["layout"] == "channels_last"
    assert set(executable.choices["kernels"].values()) == {"packed"}


def test_choices_of_another_module_are_refused() -> None:
    x = torch.randn(1, 3)
    executable = fxopt.lower(nn.Linear(3, 2).eval(), x)
    other = fxopt.lower(nn.Sequential(nn.Linear(3, 2)).eval(), x)
    other._choices, other._built = dict(executable.choices), None
    with pytest.raises(EngineError, match="the choices are those of another module"):
        other(x)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_bias_that_is_added_to_a_product_is_a_part_of_it(in_place: bool) -> None:
    model, x = ByHand(in_place).eval(), torch.randn(3, 12)
    with torch.no_grad():
        found = Layers(fxopt.capture(model, (x,)).module, lambda _: None).layers
    assert [layer.bias is not None and layer.last is not layer.node for layer in found] == [True]


def test_functions_are_taken_too() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(F.conv2d(x, self.weight, None, 1, 1))

    model, x = Functional().eval(), torch.randn(2, 3, 5, 5)
    executable = lowered(model, x)
    assert len(executable.choices["kernels"]) == 1
    assert_runs_alike(executable, model, x)
