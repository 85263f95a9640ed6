"""fuse: what it rewrites, what it refuses and why, and that neither shows in the outputs."""

from __future__ import annotations

import copy
import operator
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from fxopt.contract import Skip
from fxopt.modules import Activation, Fused, FusedConv2d
from passes import QAT, Fuse
from passes.qat import calibrate
from tests.models import STATIC, ConvBlock, ConvTwice, OneConvTwoNorms, PairTwice, ResidualBlock, settle
from tests.passes.programs import assert_close, captured, rewrite, run

IMAGE = (2, 4, 7, 7)


class Functional(nn.Module):
    """conv -> bn as functions of parameters."""

    def __init__(self, bias: bool = True, keywords: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.offset = nn.Parameter(torch.randn(6)) if bias else None
        self.register_buffer("mean", torch.randn(6))
        self.register_buffer("var", torch.rand(6) + 0.5)
        self.gamma = nn.Parameter(torch.rand(6) + 0.5)
        self.beta = nn.Parameter(torch.randn(6))
        self.keywords = keywords

    def forward(self, x):
        if self.keywords:
            y = F.conv2d(input=x, weight=self.weight, bias=self.offset, padding=1)
            return F.batch_norm(
                input=y, running_mean=self.mean, running_var=self.var, weight=self.gamma, bias=self.beta, training=False
            )
        y = F.conv2d(x, self.weight, self.offset, 1, 1)
        return F.batch_norm(y, self.mean, self.var, self.gamma, self.beta, False, 0.1, 1e-3)


class ModeAware(Functional):
    def forward(self, x):
        y = F.conv2d(x, self.weight, self.offset)
        return F.batch_norm(y, self.mean, self.var, self.gamma, self.beta, self.training)


class FunctionalLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))
        self.bn = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.bn(F.linear(x, self.weight))


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x):
        return F.relu(input=self.bn(input=self.conv(input=x)))


class PlainSubclass(nn.Conv2d):
    """Overrides nothing that counts."""

    def flops(self) -> int:
        return 0


class Then(nn.Module):
    """conv, then what it is given."""

    def __init__(self, follow: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.follow = follow

    def forward(self, x):
        return self.follow(self.conv(x))


class Adds(nn.Module):
    def __init__(self, combine: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.combine = combine

    def forward(self, x):
        y = torch.cos(x)
        return self.combine(self.conv(x), y)


def sequence(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(*[copy.deepcopy(layer) for layer in layers])


def no_affine() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False))


FOLDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "conv1d": (sequence(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 9), ["1: folded into '0'"]),
    "conv2d": (sequence(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)), IMAGE, ["1: folded into '0'"]),
    "conv3d": (sequence(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)), (2, 2, 4, 4, 4), ["1: folded into '0'"]),
    "grouped": (sequence(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8)), IMAGE, ["1: folded into '0'"]),
    "depthwise": (sequence(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)), IMAGE, ["1: folded into '0'"]),
    "reflect": (
        sequence(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4)),
        IMAGE,
        ["1: folded into '0'"],
    ),
    "transposed": (sequence(nn.ConvTranspose2d(4, 6, 3, 2), nn.BatchNorm2d(6)), IMAGE, ["1: folded into '0'"]),
    "transposed, grouped": (
        sequence(nn.ConvTranspose2d(4, 6, 3, 2, groups=2, bias=False), nn.BatchNorm2d(6)),
        IMAGE,
        ["1: folded into '0'"],
    ),
    "transposed, 1d": (sequence(nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6)), (2, 4, 5), ["1: folded into '0'"]),
    "linear": (sequence(nn.Linear(4, 6), nn.BatchNorm1d(6)), (3, 4), ["1: folded into '0'"]),
    "without affine": (no_affine, IMAGE, ["1: folded into '0'"]),
    "subclass": (sequence(PlainSubclass(4, 6, 3), nn.BatchNorm2d(6)), IMAGE, ["1: folded into '0'"]),
    "sync": (sequence(nn.Conv2d(4, 6, 3), nn.SyncBatchNorm(6)), IMAGE, ["1: folded into '0'"]),
    "before": (sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3)), IMAGE, ["0: folded into '1'"]),
    "before, grouped": (sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)), IMAGE, ["0: folded into '1'"]),
    "before, circular": (
        sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")),
        IMAGE,
        ["0: folded into '1'"],
    ),
    "before, point": (sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 1, padding="same")), IMAGE, ["0: folded into '1'"]),
    "before, linear": (sequence(nn.BatchNorm1d(4), nn.Linear(4, 6, bias=False)), (3, 4), ["0: folded into '1'"]),
    "before, transposed point": (
        sequence(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 1, groups=2)),
        IMAGE,
        ["0: folded into '1'"],
    ),
    "functional": (Functional, IMAGE, ["batch_norm: folded into 'conv2d'"]),
    "functional, no bias": (lambda: Functional(bias=False), IMAGE, ["batch_norm: folded into 'conv2d'"]),
    "functional, keywords": (lambda: Functional(keywords=True), IMAGE, ["batch_norm: folded into 'conv2d'"]),
    "functional, mode-aware": (ModeAware, IMAGE, ["batch_norm: folded into 'conv2d'"]),
    "functional linear": (FunctionalLinear, (3, 4), ["bn: folded into 'linear'"]),
    "keywords": (Keywords, IMAGE, ["bn: folded into 'conv'", "relu: relu fused into 'conv'"]),
    "pair twice": (PairTwice, IMAGE, ["bn: folded into 'conv'"]),
    "bn, bn, conv": (
        sequence(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)),
        IMAGE,
        ["1: folded into '2'", "0: folded into '2'"],
    ),
    "conv, bn, bn": (
        sequence(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)),
        IMAGE,
        ["1: folded into '0'", "2: folded into '0'"],
    ),
    "conv, bn, conv, bn": (
        sequence(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)),
        IMAGE,
        ["1: folded into '0'", "3: folded into '2'"],
    ),
}


@pytest.mark.parametrize("name", FOLDS)
def test_folds(name: str) -> None:
    factory, shape, expected = FOLDS[name]
    torch.manual_seed(0)
    model = settle(factory()).eval()
    x = torch.randn(*shape)
    before = copy.deepcopy(model.state_dict())
    outcome = run(Fuse(), model, (x,))
    assert outcome.whats == expected
    assert "batch_norm" not in "".join(outcome.calls)
    assert_close(outcome.module(x), model(x), 1e-4)
    assert_close(model.state_dict(), before, 0)


def frozen_statistics() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False))
    return model.eval()


def in_training() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).eval()
    model[1].train()
    return model


def hooked(index: int) -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).eval()
    model[index].register_forward_hook(double)
    return model


def double(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
    return output * 2


def parametrized() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Conv2d(4, 6, 3)), nn.BatchNorm2d(6)).eval()


def tied() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, bias=False)).eval()
    model[2].weight = model[0].weight
    return model


class AlsoReturned(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x):
        y = self.conv(x)
        return y, self.bn(y)


class WrittenBetween(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 6, 3)

    def forward(self, x):
        x = x + 1
        y = self.bn(x)
        x.mul_(2)
        return self.conv(y), x


class ComputedWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 3, 3))
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x):
        return self.bn(F.conv2d(x, self.weight.tanh()))


class BatchStatistics(Functional):
    def forward(self, x):
        y = F.conv2d(x, self.weight, self.offset)
        return F.batch_norm(y, self.mean, self.var, training=True)


class WrittenStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x):
        y = self.bn(self.conv(x))
        self.bn.running_mean.lerp_(y.mean((0, 2, 3)), 0.1)
        return y


def overflowing() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).eval()
    model[1].weight.data.fill_(3e38)
    model[0].weight.data.fill_(30)
    return model


REFUSALS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "two norms": (OneConvTwoNorms, (2, 3, 8, 8), "the output of 'conv' is used by 'bn1', 'bn2'"),
    "once without": (ConvTwice, IMAGE, "'conv' is also called without it"),
    "hook on conv": (lambda: hooked(0), IMAGE, "'0' stays as it is: it has a forward hook"),
    "hook on bn": (lambda: hooked(1), IMAGE, "it has a forward hook"),
    "no statistics": (frozen_statistics, IMAGE, "it keeps no running statistics"),
    "in training mode": (in_training, IMAGE, "it is in training mode"),
    "(N, C, L)": (sequence(nn.Linear(4, 6), nn.BatchNorm1d(5)), (2, 5, 4), "its input has 3 dimensions, not 2"),
    "(N, C, L) before": (sequence(nn.BatchNorm1d(5), nn.Linear(4, 6)), (2, 5, 4), "its input has 3 dimensions, not 2"),
    "no batch": (sequence(nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6)), (4, 6), "its input has 2 dimensions, not 3"),
    "tied": (tied, IMAGE, "the parameters of '0' are tied: '2' read them too"),
    "is an output": (AlsoReturned, IMAGE, "the output of 'conv' is used by 'bn', 'output'"),
    "written between": (WrittenBetween, IMAGE, "its input is written in place by 'mul_' meanwhile"),
    "computed weight": (ComputedWeight, IMAGE, "its weight or bias is computed, not a parameter"),
    "batch statistics": (BatchStatistics, IMAGE, "it is called in training mode"),
    "written statistics": (WrittenStatistics, IMAGE, "the graph writes into its statistics or parameters"),
    "overflows": (overflowing, IMAGE, "the folded values do not fit float32"),
    "zero padding": (
        sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding=1)),
        IMAGE,
        "the convolution pads with zeros behind it",
    ),
    "same padding": (
        sequence(nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, padding="same")),
        IMAGE,
        "the convolution pads with zeros behind it",
    ),
    "before transposed": (
        sequence(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3)),
        IMAGE,
        "each output of a transposed convolution sums other taps",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses(name: str) -> None:
    factory, shape, reason = REFUSALS[name]
    torch.manual_seed(0)
    model = factory()
    trained = [module.training for module in model.modules()]
    model = settle(model).eval() if name != "overflows" else model.eval()
    if name == "in training mode":
        for module, training in zip(model.modules(), trained, strict=True):
            module.training = training
        model.training = False
    x = torch.randn(*shape)
    program = captured(model, (x,))
    outcome = rewrite(Fuse(activations=False), program)
    assert not outcome.changes
    assert any(reason in text for text in outcome.reasons), outcome.reasons
    assert_close(outcome.module(x.clone()), model(x.clone()), 0)


def test_parametrized_weights_stay() -> None:
    torch.manual_seed(0)
    model = settle(parametrized()).eval()
    x = torch.randn(*IMAGE)
    outcome = run(Fuse(), model, (x,))
    assert not outcome.changes
    assert "its parameters are parametrized: 'weight'" in outcome.reasons[0]
    assert_close(outcome.module(x), model(x), 0)


def test_unknown_shapes_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).eval()
    program = captured(model, (torch.randn(3, 4),))
    for node in program.graph.nodes:
        node.meta.pop("tensor_meta", None)
    outcome = rewrite(Fuse(), program)
    assert not outcome.changes
    assert "how many dimensions its input has is not known" in outcome.reasons[0]


ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], Activation]] = {
    "nn.ReLU": (lambda: Then(nn.ReLU()), Activation("relu")),
    "nn.ReLU in place": (lambda: Then(nn.ReLU(inplace=True)), Activation("relu")),
    "F.relu": (lambda: Then(F.relu), Activation("relu")),
    "F.relu in place": (lambda: Then(lambda y: F.relu(y, inplace=True)), Activation("relu")),
    "torch.relu": (lambda: Then(torch.relu), Activation("relu")),
    "torch.relu_": (lambda: Then(torch.relu_), Activation("relu")),
    "x.relu()": (lambda: Then(lambda y: y.relu()), Activation("relu")),
    "x.relu_()": (lambda: Then(lambda y: y.relu_()), Activation("relu")),
    "nn.ReLU6": (lambda: Then(nn.ReLU6()), Activation("relu6")),
    "F.relu6": (lambda: Then(F.relu6), Activation("relu6")),
    "nn.LeakyReLU": (lambda: Then(nn.LeakyReLU(0.2)), Activation("leaky_relu", (("negative_slope", 0.2),))),
    "F.leaky_relu": (
        lambda: Then(lambda y: F.leaky_relu(y, 0.3)),
        Activation("leaky_relu", (("negative_slope", 0.3),)),
    ),
    "nn.SiLU": (lambda: Then(nn.SiLU()), Activation("silu")),
    "F.silu": (lambda: Then(F.silu), Activation("silu")),
    "nn.GELU": (lambda: Then(nn.GELU()), Activation("gelu", (("approximate", "none"),))),
    "F.gelu tanh": (
        lambda: Then(lambda y: F.gelu(y, approximate="tanh")),
        Activation("gelu", (("approximate", "tanh"),)),
    ),
    "nn.Hardswish": (lambda: Then(nn.Hardswish()), Activation("hardswish")),
    "F.hardswish": (lambda: Then(F.hardswish), Activation("hardswish")),
    "nn.Sigmoid": (lambda: Then(nn.Sigmoid()), Activation("sigmoid")),
    "torch.sigmoid": (lambda: Then(torch.sigmoid), Activation("sigmoid")),
    "x.sigmoid()": (lambda: Then(lambda y: y.sigmoid()), Activation("sigmoid")),
    "nn.Tanh": (lambda: Then(nn.Tanh()), Activation("tanh")),
    "x.tanh()": (lambda: Then(lambda y: y.tanh()), Activation("tanh")),
    "nn.Hardtanh": (lambda: Then(nn.Hardtanh(-2, 3)), Activation("hardtanh", (("min_val", -2), ("max_val", 3)))),
    "F.hardtanh": (
        lambda: Then(lambda y: F.hardtanh(y, -0.5, 0.5)),
        Activation("hardtanh", (("min_val", -0.5), ("max_val", 0.5))),
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_fuses_activations(name: str, training: bool) -> None:
    factory, expected = ACTIVATIONS[name]
    torch.manual_seed(0)
    model = factory().train(training)
    x = torch.randn(*IMAGE)
    outcome = run(Fuse(), model, (x,))
    fused = outcome.module.get_submodule("conv")
    assert isinstance(fused, FusedConv2d)
    assert fused.activation == expected
    assert outcome.calls == ["conv"]
    assert list(outcome.module.state_dict()) == list(model.state_dict())
    assert_close(outcome.module(x), model(x))
    outcome.module(x).square().sum().backward()
    model(x).square().sum().backward()
    assert_close(fused.weight.grad, model.conv.weight.grad, 1e-4)


ADDS = {
    "a + b": lambda a, b: F.relu(a + b),
    "b + a": lambda a, b: F.relu(b + a),
    "torch.add": lambda a, b: torch.add(b, a).relu(),
    "add_": lambda a, b: torch.tanh(a.add_(b)),
    "into the other": lambda a, b: F.relu(b.add_(a)),
    "iadd": lambda a, b: F.silu(operator.iadd(a, b)),
}


@pytest.mark.parametrize("name", ADDS)
def test_fuses_additions(name: str) -> None:
    torch.manual_seed(0)
    model = Adds(ADDS[name]).eval()
    x = torch.randn(*IMAGE)
    outcome = run(Fuse(), model, (x,))
    fused = outcome.module.get_submodule("conv")
    assert isinstance(fused, FusedConv2d)
    assert fused.adds
    assert outcome.calls == ["cos", "conv"]
    assert_close(outcome.module(x), model(x))


class FunctionThen(nn.Module):
    """A function of the module's own parameters, then what it is given."""

    def __init__(self, affine: Callable[..., torch.Tensor], follow: Callable[..., torch.Tensor], *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))
        self.offset = nn.Parameter(torch.randn(4))
        self.affine = affine
        self.follow = follow

    def forward(self, x):
        return self.follow(self.affine(x, self.weight, self.offset), x)


FUNCTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    "conv2d, relu": (
        lambda: FunctionThen(lambda x, w, b: F.conv2d(x, w, b, 1, 1), lambda y, x: F.relu(y), 4, 4, 3, 3),
        IMAGE,
        ["relu: relu fused into 'conv2d'"],
    ),
    "conv1d by keywords, tanh": (
        lambda: FunctionThen(
            lambda x, w, b: F.conv1d(input=x, weight=w, bias=b, padding=1, dilation=2), lambda y, x: y.tanh(), 4, 4, 3
        ),
        (2, 4, 9),
        ["tanh: tanh fused into 'conv1d'"],
    ),
    "without a bias, gelu": (
        lambda: FunctionThen(lambda x, w, b: F.linear(x, w), lambda y, x: F.gelu(y, approximate="tanh"), 4, 4),
        (3, 4),
        ["gelu: gelu(approximate='tanh') fused into 'linear'"],
    ),
    "transposed, leaky relu": (
        lambda: FunctionThen(
            lambda x, w, b: F.conv_transpose2d(x, w, b, 2, groups=2), lambda y, x: F.leaky_relu(y, 0.3), 4, 2, 3, 3
        ),
        IMAGE,
        ["leaky_relu: leaky_relu(negative_slope=0.3) fused into 'conv_transpose2d'"],
    ),
    "conv2d, add, relu": (
        lambda: FunctionThen(lambda x, w, b: F.conv2d(x, w, b, padding=1), lambda y, x: F.relu(y + x), 4, 4, 3, 3),
        IMAGE,
        ["add: addition and relu fused into 'conv2d'"],
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_fuses_into_functions(name: str, training: bool) -> None:
    factory, shape, whats = FUNCTIONS[name]
    torch.manual_seed(0)
    model = factory().train(training)
    x = torch.randn(*shape)
    outcome = run(Fuse(), model, (x,))
    assert outcome.whats == whats
    assert outcome.calls == ["fused_call"]
    assert list(outcome.module.state_dict()) == list(model.state_dict())
    assert_close(outcome.module(x), model(x))
    outcome.module(x).square().sum().backward()
    model(x).square().sum().backward()
    assert_close(outcome.module.weight.grad, model.weight.grad, 1e-4)


def test_a_function_that_is_fused_is_quantised_like_any_layer() -> None:
    model = FUNCTIONS["conv2d, add, relu"][0]().eval()
    x = torch.randn(*IMAGE)
    fused = run(Fuse(), model, (x,))
    outcome = rewrite(QAT(), fused.module)
    assert outcome.whats == ["conv2d: weight fake-quantised to 8 bits and input fake-quantised to 8 bits"]
    calibrate(outcome.module, [(x,)])
    error = (outcome.module(x) - model(x)).norm() / model(x).norm()
    assert 0 < error < 0.05
    assert not rewrite(QAT(), outcome.module).changes


def test_a_program_with_a_fused_function_survives_a_pickle() -> None:
    model = FUNCTIONS["conv2d, add, relu"][0]().eval()
    x = torch.randn(*IMAGE)
    outcome = run(Fuse(), model, (x,))
    assert_close(pickle.loads(pickle.dumps(outcome.module))(x), model(x))


class NormAct(nn.BatchNorm2d):
    """A batch norm with its activation, which looks at its mode itself: each mode is a graph of its own."""

    def forward(self, x):
        bn_training = True if self.training else self.running_mean is None
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, bn_training, 0.1, self.eps)
        return F.relu(x)


class NormWithAct(NormAct):
    """Its activation has a parameter under its name."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.PReLU()

    def forward(self, x):
        return self.act(super().forward(x) - 1)


class OtherMomentum(NormAct):
    def __init__(self, channels):
        super().__init__(channels, momentum=0.2)


class CountsByTwo(NormAct):
    def forward(self, x):
        if self.training:
            self.num_batches_tracked.add_(1)
        return super().forward(x)


class ReadsItsMean(NormAct):
    def forward(self, x):
        return super().forward(x) + self.running_mean.sum()


class Hooked(NormAct):
    def __init__(self, channels):
        super().__init__(channels)
        self.register_forward_hook(lambda _, inputs, output: output * 2)


OWN_STEPS: dict[str, Callable[[], nn.Module]] = {
    kind.__name__: partial(kind, 6) for kind in (OtherMomentum, CountsByTwo, ReadsItsMean, Hooked)
}


class TestTwoGraphs:
    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Conv2d(4, 6, 3), NormAct(6), nn.Conv2d(6, 4, 3, bias=False), NormAct(4))
        for _ in range(3):
            model(torch.randn(*IMAGE))
        return model.eval()

    def test_the_graph_in_use_is_folded_and_runs_in_both_modes(self) -> None:
        model, x = self.model(), torch.randn(*IMAGE)
        program = captured(model, (x,))
        assert set(program.graphs) == {False, True}
        outcome = rewrite(Fuse(), program)
        assert outcome.calls == ["0", "2"]
        assert outcome.whats[0] == "evaluation graph: runs in both modes from now on, with batch norms folded"
        assert len(outcome.changes) == 5
        assert_close(program(x), model(x))
        assert_close(program.train()(x), model(x))
        assert "NormAct" in repr(program)
        assert_close(copy.deepcopy(program).eval()(x), model(x))
        assert set(program.graphs) == {None}

    @pytest.mark.parametrize("plain", [False, True])
    def test_a_model_that_trains_keeps_both_and_joins_in_both(self, plain: bool) -> None:
        torch.manual_seed(0)
        model, x = self.model().train(), torch.randn(*IMAGE)
        if plain:  # one that is called as a module, in two graphs for the sake of the other
            model[1] = nn.BatchNorm2d(6)
        program = captured(model, (x,))
        outcome = rewrite(Fuse(), program)
        assert [change.what for change in outcome.changes] == [
            "joined with '0' for training, not folded",
            "joined with '2' for training, not folded",
        ]
        assert all("called in evaluation mode too" in skip.reason for skip in outcome.skips)  # activations
        assert set(program.graphs) == {False, True}
        for _ in range(3):
            for module in (program, model):
                module.zero_grad()
                module(x).square().mean().backward()
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter -= 0.1 * parameter.grad
            assert_close(program(x), model(x))
        assert_close(program.eval()(x), model.eval()(x))
        other = copy.deepcopy(program)
        other.load_state_dict(model.state_dict())
        assert_close(other(x), model(x))
        assert int(other.state_dict()["0.bn.num_batches_tracked"]) == int(model[1].num_batches_tracked)

    def test_what_else_a_norm_holds_stays_where_it_is(self) -> None:
        model, x = nn.Sequential(nn.Conv2d(4, 6, 3), NormWithAct(6)).train(), torch.randn(*IMAGE)
        program = captured(model, (x,))
        rewrite(Fuse(), program)
        assert "1.act.weight" in program.state_dict()
        assert "0.bn.running_mean" in program.state_dict()
        with torch.no_grad():
            model[1].act.weight.fill_(0.5)
        program.load_state_dict(model.state_dict())
        assert_close(program(x), model(x))

    @pytest.mark.parametrize("name", OWN_STEPS)
    def test_steps_that_are_not_those_of_a_batch_norm_stay(self, name: str) -> None:
        model, x = nn.Sequential(nn.Conv2d(4, 6, 3), OWN_STEPS[name]()).train(), torch.randn(*IMAGE)
        program = captured(model, (x,))
        outcome = rewrite(Fuse(), program)
        assert not outcome.changes
        assert "this is a function" in outcome.skips[0].reason


def add_without_gradients(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        b = b.cos()
    return F.relu(a + b)


NO_ADDITION: dict[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], str]] = {
    "broadcast": (lambda a, b: F.relu(a + b.mean((2, 3), keepdim=True)), "the shapes must be equal"),
    "in place into the other": (lambda a, b: F.relu(b.view(IMAGE).add_(a)) + b, "it adds in place into 'view'"),
    "behind a region without gradients": (add_without_gradients, "gradients or autocast are switched on or off"),
    "used again": (lambda a, b: F.relu(a + b) * a, "the output of 'conv' is used by"),
}


@pytest.mark.parametrize("name", NO_ADDITION)
def test_refuses_additions(name: str) -> None:
    combine, reason = NO_ADDITION[name]
    torch.manual_seed(0)
    model = Adds(combine).eval()
    x = torch.randn(*IMAGE)
    outcome = run(Fuse(), model, (x,))
    assert not outcome.changes
    assert reason in outcome.reasons[0]
    assert_close(outcome.module(x), model(x), 0)


@pytest.mark.parametrize(
    "follow",
    [lambda y: torch.add(y, y.cos(), alpha=2).relu(), lambda y: (y + y).relu(), lambda y: (y + 1).relu(), F.softplus],
)
def test_leaves_other_followers(follow: Callable[[torch.Tensor], torch.Tensor]) -> None:
    outcome = run(Fuse(), Then(follow).eval(), (torch.randn(*IMAGE),))
    assert not outcome.changes


def test_an_activation_in_place_that_another_sees_stays() -> None:
    def follow(y: torch.Tensor) -> torch.Tensor:
        flat = y.view(-1)
        y.relu_()
        return flat

    model = Then(follow).eval()
    x = torch.randn(*IMAGE)
    outcome = run(Fuse(), model, (x,))
    assert not outcome.changes
    assert "the output of 'conv' is used by 'view', 'relu_'" in outcome.reasons[0]


def test_an_input_written_before_the_addition_stays() -> None:
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            x = x + 1
            y = self.conv(x)
            x.mul_(2)
            return F.relu(y + x)

    model = Writes().eval()
    x = torch.randn(*IMAGE)
    outcome = run(Fuse(), model, (x,))
    assert not outcome.changes
    assert "'mul_' writes in place what the layer reads" in outcome.reasons[0]
    assert_close(outcome.module(x), model(x), 0)


def test_one_shared_activation_is_fused_everywhere() -> None:
    model = STATIC["staged_cnn"].build()
    x = STATIC["staged_cnn"].example()
    outcome = run(Fuse(), model, x)
    assert not outcome.skips
    # The one that stays follows a product, not a layer.
    assert [call for call in outcome.calls if call.endswith(("relu", "activation"))] == ["stages.0.1.activation"]
    assert_close(outcome.module(*x), model(*x), 1e-4)


def test_options_choose_layers() -> None:
    model = STATIC["feature_extractor"].build()
    x = STATIC["feature_extractor"].example()
    assert {c.where for c in run(Fuse(include="block1.*"), model, x).changes} == {"block1.bn", "block1.relu"}
    assert {c.where for c in run(Fuse(exclude="block1.*"), model, x).changes} == {"block2.bn", "block2.relu"}
    assert {c.where for c in run(Fuse(activations=False), model, x).changes} == {"block1.bn", "block2.bn"}
    block = STATIC["residual_block"]
    assert not any("addition" in c.what for c in run(Fuse(adds=False), block.build(), block.example()).changes)


def test_half_precision_weights_with_float_statistics() -> None:
    model = settle(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))).eval()
    model[0].bfloat16()
    x = torch.randn(*IMAGE).bfloat16()
    outcome = run(Fuse(), model, (x,))
    assert outcome.module.get_parameter("0.weight").dtype is torch.bfloat16
    assert_close(outcome.module(x), model(x), 5e-2)


def test_frozen_stays_frozen() -> None:
    model = settle(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())).eval().requires_grad_(False)
    outcome = run(Fuse(), model, (torch.randn(*IMAGE),))
    assert not any(parameter.requires_grad for parameter in outcome.module.parameters())


class MovingAverage(nn.Module):
    """Keeps a slow copy of a block, as momentum encoders do: its forward reads and writes parameters of batch norms."""

    def __init__(self) -> None:
        super().__init__()
        self.quick = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6))
        self.slow = copy.deepcopy(self.quick).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            for quick, slow in zip(self.quick.parameters(), self.slow.parameters(), strict=True):
                slow.mul_(0.9).add_(quick, alpha=0.1)
            aim = self.slow(x)
        return (self.quick(x) - aim).square().mean()


class TestTraining:
    def test_joins_and_trains_alike(self) -> None:
        torch.manual_seed(0)
        model = ConvBlock(4, 6).train()
        x = torch.randn(*IMAGE)
        outcome = run(Fuse(), model, (x,))
        assert outcome.whats == ["bn: joined with 'conv' for training, not folded", "relu: relu fused into 'conv'"]
        fused = outcome.module
        for _ in range(3):
            for module in (fused, model):
                module.zero_grad()
                module(x).square().mean().backward()
                with torch.no_grad():
                    for parameter in module.parameters():
                        parameter -= 0.1 * parameter.grad
            assert_close(fused(x), model(x))
        assert_close(fused.eval()(x), model.eval()(x))

    def test_the_former_state_dict_loads(self) -> None:
        model = settle(ResidualBlock(4, 8, stride=2)).train()
        outcome = run(Fuse(), model, (torch.randn(*IMAGE),))
        assert "conv1.bn.running_mean" in outcome.module.state_dict()
        other = settle(ResidualBlock(4, 8, stride=2)).train()
        restored = pickle.loads(pickle.dumps(outcome.module))
        restored.load_state_dict(other.state_dict())
        x = torch.randn(*IMAGE)
        assert_close(restored.eval()(x), other.eval()(x))
        restored.load_state_dict(restored.state_dict())

    @pytest.mark.parametrize(
        ("model", "reason"),
        [
            (PairTwice(), "it is called at more than one place"),
            (ConvTwice(), "'conv' is also called at"),
            (Functional(), "in training mode only modules are joined"),
            (nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)), "keeps no running"),
            (MovingAverage(), "the forward also reads its weight itself, at "),
        ],
    )
    def test_refuses(self, model: nn.Module, reason: str) -> None:
        outcome = run(Fuse(), model.train(), (torch.randn(*IMAGE),))
        assert not outcome.changes
        assert reason in outcome.reasons[0]

    def test_a_frozen_norm_is_refused(self) -> None:
        model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)).train()
        model[1].eval()
        outcome = run(Fuse(), model, (torch.randn(*IMAGE),))
        assert "it is in evaluation mode while the model trains" in outcome.reasons[0]


@pytest.mark.parametrize("name", STATIC)
def test_static_models(name: str) -> None:
    case = STATIC[name]
    model, inputs = case.build(), case.example()
    state = copy.deepcopy(model.state_dict())
    outcome = run(Fuse(), model, inputs, case.kwargs)
    assert_close(outcome.module(*inputs, **case.kwargs), model(*inputs, **case.kwargs), 1e-4)
    assert_close(model.state_dict(), state, 0)
    assert not rewrite(Fuse(), outcome.module).changes


# Random programs


@st.composite
def programs(draw: st.DrawFn) -> nn.Module:
    """Straight lines of layers with residuals between them."""
    kinds = st.sampled_from(["conv", "grouped", "point", "bn", "act", "act_", "add", "again"])
    return Random(draw(st.lists(kinds, min_size=1, max_size=8)), draw(st.integers(0, 1000)))


class Random(nn.Module):
    def __init__(self, kinds: list[str], seed: int):
        super().__init__()
        torch.manual_seed(seed)
        made = {
            "conv": lambda: nn.Conv2d(4, 4, 3, padding=1, bias=False),
            "grouped": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2),
            "point": lambda: nn.Conv2d(4, 4, 1),
            "bn": lambda: nn.BatchNorm2d(4),
            "act": nn.SiLU,
            "act_": lambda: nn.ReLU(inplace=True),
        }
        self.kinds = kinds
        self.layers = nn.ModuleList(made[kind]() if kind in made else nn.Identity() for kind in kinds)
        settle(self)

    def forward(self, x):
        x = x + 0
        kept = x
        for index, (kind, layer) in enumerate(zip(self.kinds, self.layers, strict=True)):
            if kind == "add":
                x, kept = x + kept, x
            elif kind == "again":
                x = self.layers[index // 2](x)
            else:
                x = layer(x)
        return x


@settings(max_examples=40, deadline=None)
@given(programs())
def test_random_programs(model: nn.Module) -> None:
    model.eval()
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    expected = model(x)
    state = copy.deepcopy(model.state_dict())
    outcome = run(Fuse(), model, (x,))
    scale = expected.abs().max().clamp(min=1)
    assert_close(outcome.module(x) / scale, expected / scale, 1e-4)
    assert_close(model.state_dict(), state, 0)
    second = rewrite(Fuse(), outcome.module)
    assert not second.changes
    assert all(isinstance(skip, Skip) and skip.reason for skip in second.skips)


def test_a_fused_module_prints_what_it_holds() -> None:
    activation = Activation("leaky_relu", (("negative_slope", 0.1),))
    fused = Fused.of(nn.Conv2d(1, 1, 1), activation=activation, adds=True)
    assert repr(fused) == (
        "FusedConv2d(1, 1, kernel_size=(1, 1), stride=(1, 1), adds=True, activation=leaky_relu(negative_slope=0.1))"
    )


@pytest.mark.parametrize(
    "prunes",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        lambda layer: prune.global_unstructured([(layer, "weight")], prune.L1Unstructured, amount=0.5),
    ],
    ids=["one", "global"],
)
def test_a_fused_layer_is_pruned_by_torch_like_any_other(prunes: Callable[[nn.Module], Any]) -> None:
    model = settle(nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU())).eval()
    x = torch.randn(*IMAGE)
    module = run(Fuse(), model, (x,)).module
    for each in (model, module):
        prunes(each.get_submodule("0"))
    assert (module.get_submodule("0").weight == 0).float().mean() == 0.5
    assert_close(module(x), model(x))
