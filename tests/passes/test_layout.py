"""layout: what is folded into layers, what stays and why, and where channels_last begins and ends."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt.errors import SpecError
from passes import Fuse, Layout
from tests.models import settle
from tests.passes.programs import assert_close, run

IMAGE = (2, 4, 7, 7)
FOLDS = Layout(channels_last=False)
Forward = Callable[..., Any]


class Parts(nn.Module):
    """Layers and constants, and a forward that uses them."""

    def __init__(self, forward: Forward, **layers: nn.Module):
        super().__init__()
        self.run = forward
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(7, 7)
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.gamma = nn.Parameter(torch.rand(4) + 0.5)
        self.row = nn.Parameter(torch.rand(7) + 0.5)
        self.register_buffer("mean", torch.randn(1, 4, 1, 1))

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


def parts(forward: Forward, **layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: settle(Parts(forward, **{name: copy.deepcopy(layer) for name, layer in layers.items()}))


def sequence(*layers: nn.Module) -> Callable[[], nn.Module]:
    return lambda: settle(nn.Sequential(*[copy.deepcopy(layer) for layer in layers]))


POINT = nn.Conv2d(4, 4, 1, bias=False)
NORM = nn.BatchNorm2d(4)


def repvgg(self: Any, x: torch.Tensor) -> torch.Tensor:
    return F.relu(self.bn3(self.conv(x)) + self.bn1(self.point(x)) + self.norm(x))


Row = tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]
PADS: dict[str, Row] = {
    "by nothing": (parts(lambda self, x: self.conv(F.pad(x, ()))), IMAGE, ["pad: folded into the padding of 'conv'"]),
    "module": (sequence(nn.ZeroPad2d(1), nn.Conv2d(4, 6, 3)), IMAGE, ["0: folded into the padding of '1'"]),
    "on top of its own": (
        sequence(nn.ZeroPad2d((2, 2, 1, 1)), nn.Conv2d(4, 6, 3, padding=(0, 1), stride=2)),
        IMAGE,
        ["0: folded into the padding of '1'"],
    ),
    "constant of zero": (
        sequence(nn.ConstantPad1d(2, 0.0), nn.Conv1d(4, 6, 3, padding="valid")),
        (2, 4, 7),
        ["0: folded into the padding of '1'"],
    ),
    "3-d": (
        sequence(nn.ConstantPad3d((1, 1, 0, 0, 2, 2), 0), nn.Conv3d(2, 4, 2)),
        (2, 2, 4, 4, 4),
        ["0: folded into the padding of '1'"],
    ),
    "function": (
        parts(lambda self, x: F.conv2d(F.pad(x, (1, 1, 2, 2)), self.conv.weight, self.conv.bias)),
        IMAGE,
        ["pad: folded into the padding of 'conv2d'"],
    ),
    "function with padding": (
        parts(lambda self, x: F.conv2d(F.pad(x, (1, 1)), self.conv.weight, self.conv.bias, 1, 1)),
        IMAGE,
        ["pad: folded into the padding of 'conv2d'"],
    ),
    "two convolutions": (
        parts(lambda self, x: (lambda y: self.conv(y) * self.point(y)[..., 1:-1, 1:-1].sum())(F.pad(x, [1] * 4)),
              point=nn.Conv2d(4, 4, 1)),
        IMAGE,
        ["pad: folded into the padding of 'conv', 'point'"],
    ),
}  # fmt: skip
SCALES: dict[str, Row] = {
    "scale": (parts(lambda self, x: self.conv(x) * self.gamma[:, None, None]), IMAGE, ["mul: folded into 'conv'"]),
    "scale in front": (parts(lambda self, x: 0.5 * self.conv(x)), IMAGE, ["mul: folded into 'conv'"]),
    "all four": (
        parts(lambda self, x: ((2 - self.conv(x)) / 3 + self.mean) * self.gamma.reshape(1, -1, 1, 1) - 1),
        IMAGE,
        [f"{name}: folded into 'conv'" for name in ("sub", "truediv", "add", "mul", "sub_1")],
    ),
    "without bias": (
        parts(lambda self, x: self.point(x) * 2, point=POINT), IMAGE, ["mul: folded into 'point'"]),
    "linear": (
        parts(lambda self, x: self.linear(x) * self.row + 1), (3, 7),
        ["mul: folded into 'linear'", "add: folded into 'linear'"]),
    "linear of many dimensions": (
        parts(lambda self, x: self.linear(x) * self.row), IMAGE, ["mul: folded into 'linear'"]),
    "function": (
        parts(lambda self, x: F.linear(x, self.linear.weight) / self.row), (3, 7), ["truediv: folded into 'linear'"]),
    "by its other name": (
        parts(lambda self, x: torch.multiply(self.linear(x), self.row)), IMAGE, ["multiply: folded into 'linear'"]),
    "behind a permutation": (
        parts(lambda self, x: self.gamma[:, None, None] * self.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
              fc=nn.Linear(4, 4)),
        IMAGE,
        ["mul: folded into 'fc'"],
    ),
    "behind identities": (
        parts(lambda self, x: self.drop(self.same(self.conv(x))).swapaxes(1, 3).contiguous() * self.gamma,
              same=nn.Identity(), drop=nn.Dropout()),
        IMAGE,
        ["mul: folded into 'conv'"],
    ),
    "its size is asked for": (
        parts(lambda self, x: (lambda y: (y * self.gamma[:, None, None]).reshape(y.shape[0], -1))(self.conv(x))),
        IMAGE,
        ["mul: folded into 'conv'"],
    ),
    "transposed, grouped": (
        parts(lambda self, x: self.up(x) * self.gamma[:, None, None],
              up=nn.ConvTranspose2d(4, 4, 3, groups=2)),
        IMAGE,
        ["mul: folded into 'up'"],
    ),
    "before": (
        parts(lambda self, x: self.open(x * self.gamma[:, None, None] + 1), open=nn.Conv2d(4, 6, 3, groups=2)),
        IMAGE,
        ["add: folded into 'open'", "mul: folded into 'open'"],
    ),
    "before a padded one": (
        parts(lambda self, x: self.conv(x / 255)), IMAGE, ["truediv: folded into 'conv'"]),
    "before a linear layer": (
        parts(lambda self, x: self.linear((x - 0.5) / self.row)), (3, 7),
        ["truediv: folded into 'linear'", "sub: folded into 'linear'"]),
    "before a transposed one": (
        parts(lambda self, x: self.up(x * self.gamma[:, None, None]), up=nn.ConvTranspose2d(4, 6, 3, groups=2)),
        IMAGE,
        ["mul: folded into 'up'"],
    ),
}  # fmt: skip
BRANCHES: dict[str, Row] = {
    "repvgg": (
        parts(repvgg, point=POINT, bn1=NORM, bn3=NORM, norm=NORM),
        IMAGE,
        ["add_1: 3 branches merged into 'conv'"],
    ),
    "two kernels": (
        parts(lambda self, x: self.point(x) + self.conv(x), point=POINT),
        IMAGE,
        ["add: 2 branches merged into 'conv'"],
    ),
    "the input itself": (parts(lambda self, x: x + self.conv(x)), IMAGE, ["add: 2 branches merged into 'conv'"]),
    "depthwise": (
        parts(lambda self, x: self.norm(x) + self.deep(x), deep=nn.Conv2d(4, 4, 3, padding=1, groups=4), norm=NORM),
        IMAGE,
        ["add: 2 branches merged into 'deep'"],
    ),
    "grouped, strided": (
        parts(lambda self, x: self.five(x) + self.three(x),
              five=nn.Conv2d(4, 6, 5, 2, 2, groups=2), three=nn.Conv2d(4, 6, 3, 2, 1, groups=2)),
        IMAGE,
        ["add: 2 branches merged into 'five'"],
    ),
    "of two shapes": (
        parts(lambda self, x: self.wide(x) + self.conv(x), wide=nn.Conv2d(4, 4, (3, 1), padding=(1, 0))),
        IMAGE,
        ["add: 2 branches merged into 'conv'"],
    ),
    "dilated": (
        parts(lambda self, x: self.point(x) + self.far(x), point=POINT, far=nn.Conv2d(4, 4, 3, padding=2, dilation=2)),
        IMAGE,
        ["add: 2 branches merged into 'far'"],
    ),
    "dilated, with the input": (
        parts(lambda self, x: self.far(x) + x, far=nn.Conv2d(4, 4, 3, padding=2, dilation=2)),
        IMAGE,
        ["add: 2 branches merged into 'far'"],
    ),
    "1-d": (
        parts(lambda self, x: self.one(x) + x, one=nn.Conv1d(4, 4, 3, padding=1)),
        (2, 4, 7),
        ["add: 2 branches merged into 'one'"],
    ),
    "one of which is asked for its shape": (
        parts(lambda self, x: (lambda p, q: (p + q).reshape(q.shape[0], -1))(self.conv(x), self.point(x)), point=POINT),
        IMAGE,
        ["add: 2 branches merged into 'conv'"],
    ),
    "through identities": (
        parts(lambda self, x: self.same(self.conv(x) + self.point(x)) + self.same(self.norm(x)),
              same=nn.Identity(), point=POINT, norm=NORM),
        IMAGE,
        ["add_1: 3 branches merged into 'conv'"],
    ),
    "functions": (
        parts(lambda self, x: F.conv2d(x, self.conv.weight, None, 1, 1) + F.conv2d(x, self.point.weight), point=POINT),
        IMAGE,
        ["add: 2 branches merged into 'conv2d'"],
    ),
}  # fmt: skip
ALL = PADS | SCALES | {f"branches, {name}": row for name, row in BRANCHES.items()}
ALL |= {"pad, function": PADS["function"], "scale, function": SCALES["function"]}


@pytest.mark.parametrize("name", ALL)
def test_folds(name: str) -> None:
    factory, shape, expected = ALL[name]
    torch.manual_seed(0)
    model = factory().eval()
    state = copy.deepcopy(model.state_dict())
    outcome = run(FOLDS, model, (torch.randn(*shape),))
    assert outcome.whats == expected
    assert not {"add", "mul", "truediv", "pad"} & set(outcome.calls) - (
        {"mul"} if name == "two convolutions" else set()
    )
    for batch in (shape[0], 3):
        x = torch.randn(batch, *shape[1:])
        assert_close(outcome.module(x), model(x), 1e-5)
    assert_close(model.state_dict(), state, 0)
    for duplicate in (copy.deepcopy(outcome.module), pickle.loads(pickle.dumps(outcome.module))):
        assert_close(duplicate(x), model(x), 1e-5)


@pytest.mark.parametrize("name", PADS)
def test_pads_fold_in_training_with_the_same_gradients(name: str) -> None:
    factory, shape, expected = PADS[name]
    torch.manual_seed(0)
    model, x = factory().train(), torch.randn(*shape)
    outcome = run(FOLDS, model, (x,))
    assert outcome.whats == expected
    for module in (model, outcome.module):
        module(x).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert_close(dict(outcome.module.named_parameters())[key].grad, parameter.grad, 1e-4)


def tied() -> nn.Module:
    model = Parts(lambda self, x: self.conv(x) * 2 + self.other(torch.cos(x)), other=nn.Conv2d(4, 4, 3, padding=1))
    model.other.weight = model.conv.weight
    return model


def hooked() -> nn.Module:
    model = Parts(lambda self, x: self.conv(F.pad(x, (1, 1, 1, 1))))
    model.conv.register_forward_hook(lambda *_: None)
    return model


def written(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.cos(x)
    z = F.pad(y, (1, 1, 1, 1))
    y[0].zero_()
    return self.conv(z)[..., 1:-1, 1:-1] * y


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "asymmetric": (sequence(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(4, 4, 3, 2)), "as much on either side"),
    "crop": (sequence(nn.ZeroPad2d(-1), nn.Conv2d(4, 4, 3)), "it crops"),
    "channels": (parts(lambda self, x: self.conv(F.pad(x[:, :2], (1, 1, 1, 1, 1, 1)))), "pads channels"),
    "padding by a word": (sequence(nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3, padding="same")), "is 'same'"),
    "reflected": (
        sequence(nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")), "by reflect itself"),
    "transposed": (sequence(nn.ZeroPad2d(1), nn.ConvTranspose2d(4, 4, 3)), "no padding of this kind"),
    "padded, called elsewhere": (
        parts(lambda self, x: self.conv(F.pad(x, (1, 1, 1, 1)))[..., 1:-1, 1:-1] + self.conv(torch.cos(x))),
        "is also called at",
    ),
    "hook": (hooked, "it has a forward hook"),
    "input written": (parts(written), "written in place by"),
    "tied": (tied, "are tied"),
    "scaled, called elsewhere": (
        parts(lambda self, x: self.conv(x) * 2 + self.conv(torch.cos(x))), "is also called at"),
    "shift before a padded one": (parts(lambda self, x: self.conv(x + 1)), "does not reach the border"),
    "too large": (parts(lambda self, x: self.conv(x) * 1e42), "do not fit"),
    "another dtype": (
        parts(lambda self, x: self.conv(x) * self.wide[0], wide=nn.ParameterList([torch.rand(4, 1, 1).double()])),
        "it gives torch.float64 for torch.float32",
    ),
    "off the middle": (
        parts(lambda self, x: self.three(x) + self.two(x),
              three=nn.Conv2d(4, 4, 3, 2, 1), two=nn.Conv2d(4, 4, 2, 2, 1)),
        "does not lie in the middle",
    ),
    "across each other": (
        parts(lambda self, x: self.tall(x) + self.wide(x),
              tall=nn.Conv2d(4, 4, (3, 1), padding=(1, 0)), wide=nn.Conv2d(4, 4, (1, 3), padding=(0, 1))),
        "the kernel of 'wide' does not lie in the middle of the largest",
    ),
    "another dilation": (
        parts(lambda self, x: self.conv(x) + self.far(x), far=nn.Conv2d(4, 4, 3, padding=2, dilation=2)),
        "has another dilation",
    ),
    "other groups": (
        parts(lambda self, x: self.conv(x) + self.deep(x), deep=nn.Conv2d(4, 4, 3, padding=1, groups=4)),
        "has other groups",
    ),
    "identity that is broadcast": (
        parts(lambda self, x: (lambda y: self.wide(y) + y)(x[..., :1, :1]), wide=nn.Conv2d(4, 4, 1, padding=1)),
        "the identity is no convolution",
    ),
    "branch whose shape is read early": (
        parts(lambda self, x: (lambda q, n, p: (q + p).reshape(n, -1))(
            q := self.point(x), q.shape[0], self.conv(x)), point=POINT),
        "a size of a branch is read before 'conv' runs",
    ),
    "branch called elsewhere": (
        parts(lambda self, x: torch.tanh(self.conv(x) + self.point(x)) + self.conv(torch.cos(x)), point=POINT),
        "is also called at",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_stays_with_the_reason(name: str) -> None:
    factory, reason = REFUSED[name]
    torch.manual_seed(0)
    model, x = factory().eval(), torch.randn(*IMAGE)
    outcome = run(FOLDS, model, (x,))
    assert not outcome.changes
    assert any(reason in said for said in outcome.reasons), outcome.reasons
    assert_close(outcome.module(x), model(x))


TRAINING = {"scale": SCALES["scale"][0], "branches": BRANCHES["two kernels"][0]}


@pytest.mark.parametrize("name", TRAINING)
def test_what_learns_stays_in_training(name: str) -> None:
    outcome = run(FOLDS, TRAINING[name]().train(), (torch.randn(*IMAGE),))
    assert not outcome.changes
    assert all("in training mode" in skip.reason for skip in outcome.skips)
    assert outcome.skips


NOTHING: dict[str, Forward] = {
    "a residual of another value": lambda self, x: self.conv(torch.cos(x)) + x,
    "a scale by position": lambda self, x: self.conv(x) * self.row,
    "a scale by the input": lambda self, x: self.conv(x) * x,
    "used twice": lambda self, x: (lambda y: y * 2 + y)(torch.tanh(x)),
    "reflection": lambda self, x: self.conv(F.pad(x, (1, 1, 1, 1), mode="reflect")),
    "ones around": lambda self, x: self.conv(F.pad(x, (1, 1, 1, 1), value=1.0)),
    "a layer called 'size' beside": lambda self, x: (lambda y: (y * 2, self.size(y)))(self.conv(x)),
    "a scale by a layer called 'view'": lambda self, x: self.conv(x) * self.view(self.mean),
}


@pytest.mark.parametrize("name", NOTHING)
def test_says_nothing_of_other_things(name: str) -> None:
    model = Parts(NOTHING[name], size=nn.Sigmoid(), view=nn.Sigmoid()).eval()
    outcome = run(FOLDS, model, (torch.randn(*IMAGE),))
    assert not outcome.changes
    assert not outcome.skips


class TwoGraphs(Parts):
    def forward(self, x: torch.Tensor) -> Any:
        y = self.run(self, x)
        return torch.tanh(y) if self.training else y


def test_where_training_is_another_graph_the_evaluated_one_is_kept() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return settle(TwoGraphs(repvgg, point=nn.Conv2d(4, 4, 1), bn1=nn.BatchNorm2d(4), bn3=nn.BatchNorm2d(4),
                                norm=nn.BatchNorm2d(4)))  # fmt: skip

    model, x = build().eval(), torch.randn(*IMAGE)
    outcome = run(FOLDS, model, (x,))
    assert [change.what for change in outcome.changes] == [
        "runs in both modes from now on, with its layers folded",
        "3 branches merged into 'conv'",
    ]
    assert_close(outcome.module(x), model(x), 1e-5)
    assert_close(outcome.module.train()(x), model(x), 1e-5)
    result = fxopt.optimize(model, x, "clean,layout,fuse", devices=())
    assert type(result.module.conv).__name__ == "FusedConv2d"
    assert not hasattr(result.module, "point")


def test_fuse_must_come_later() -> None:
    with pytest.raises(SpecError, match="'fuse' must come after 'layout': write layout,fuse"):
        fxopt.optimize(nn.Conv2d(4, 4, 3), torch.randn(*IMAGE), [Fuse(), Layout()], devices=())


def network() -> nn.Module:
    return settle(
        nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, groups=2),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 8, 3),
            nn.MaxPool2d(2),
        )
    )


class Views(nn.Module):
    """What only a contiguous tensor can do, inside and outside of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.next = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.conv(x)
        z = self.next(y.relu())
        return y, z.view(z.shape[0], -1), y.view(-1, 5).sum(0), z + 1


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("factory", [network, Views])
def test_channels_last_begins_and_ends_inside(factory: Callable[[], nn.Module], training: bool) -> None:
    torch.manual_seed(0)
    model, x = factory().train(training), torch.randn(*IMAGE)
    given = copy.deepcopy(model)
    result = fxopt.optimize(model, x, [Layout()], devices=())
    assert result.ledger.entries[0].changes[0].what.startswith("computed in channels_last")
    kernels = [value for name, value in result.module.named_parameters() if value.dim() == 4]
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    converted = [n for n in result.module.graph.nodes if n.kwargs.get("memory_format") is torch.channels_last]
    assert len(converted) == 1
    assert list(result.module.state_dict()) == list(model.state_dict())
    strided = [] if factory is Views else [x.contiguous(memory_format=torch.channels_last)]
    for each in (x, torch.randn(3, 4, 7, 7), *strided):
        expected, found = given(each), result.module(each)
        assert_close(found, expected, 1e-4)
        values = zip(*(y if isinstance(y, tuple) else (y,) for y in (found, expected)), strict=True)
        if each is x:
            assert [a.stride() == b.stride() for a, b in values] == [True] * (4 if factory is Views else 1)
    if training:
        for module in (given, result.module):
            module.zero_grad()
            sum(y.square().sum() for y in torch.utils._pytree.tree_leaves(module(x))).backward()
        gradients = {name: parameter.grad for name, parameter in given.named_parameters()}
        assert_close({n: p.grad for n, p in result.module.named_parameters()}, gradients, 1e-3)


def test_all_of_it_is_computed_in_channels_last() -> None:
    from fxopt.graph import observe

    model, x = network().eval(), torch.randn(*IMAGE)
    module = run(Layout(), model, (x,)).module
    seen: list[bool] = []
    observe(module, (x,), {}, lambda _, node, value: seen.append(
        node.op == "call_module" and not value.is_contiguous(memory_format=torch.channels_last)))  # fmt: skip
    assert not any(seen)


def test_what_is_written_between_two_layers_enters_twice() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.cos(x)
        first = self.conv(x) + self.point(x)
        x[:, 0] = 0
        return first + self.conv(x)

    torch.manual_seed(0)
    model, x = parts(forward, point=POINT)().eval(), torch.randn(*IMAGE)
    module = run(Layout(branches=False), model, (x,)).module
    converted = [n for n in module.graph.nodes if n.kwargs.get("memory_format") is torch.channels_last]
    assert len(converted) == 2
    assert_close(module(x), model(x))


CONTIGUOUS: dict[str, tuple[Forward, str]] = {
    "strides": (lambda self, x: self.conv(x).as_strided((2, 4), (4, 1)), "looks at strides"),
    "a written view": (lambda self, x: self.conv(x).view(-1).mul_(2), "is a view of memory that is written"),
    "a part of a written view": (lambda self, x: _set(self.conv(x).view(-1)), "is a view of memory that is written"),
    "random numbers": (lambda self, x: self.conv(x) + torch.rand_like(self.conv(x)), "draws random numbers"),
}


def _set(x: torch.Tensor) -> torch.Tensor:
    x[0] = 2.0
    return x


@pytest.mark.parametrize("name", CONTIGUOUS)
def test_stays_contiguous_with_the_reason(name: str) -> None:
    forward, reason = CONTIGUOUS[name]
    outcome = run(Layout(), Parts(forward).eval(), (torch.randn(*IMAGE),))
    assert not outcome.changes
    assert reason in outcome.skips[0].reason


@pytest.mark.parametrize("drop", [nn.Dropout(0.3), nn.Dropout2d(0.3)], ids=["elements", "channels"])
def test_training_drops_what_it_dropped_before(drop: nn.Module) -> None:
    """Elements are drawn in the order of memory, channels are not."""
    model = Parts(lambda self, x: self.drop(self.conv(x)), drop=drop)
    outcome = run(Layout(), model.train(), (torch.randn(*IMAGE),))
    assert bool(outcome.changes) is isinstance(drop, nn.Dropout2d)
    assert "draws random numbers" in outcome.skips[0].reason if outcome.skips else outcome.changes


def test_a_part_that_is_set_is_written_into_what_later_layers_read() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(self.conv(x))
        y[..., 1:] = x[..., :-1]
        return self.conv(y + x)

    model, x = Parts(forward).eval(), torch.randn(*IMAGE)
    assert_close(run(Layout(), model, (x,)).module(x), model(x))


def test_shared_and_tied_kernels_stay_so() -> None:
    model = Parts(
        lambda self, x: self.conv(x) * self.conv(torch.cos(x)) + self.other(x), other=nn.Conv2d(4, 4, 3, padding=1)
    )
    model.other.weight = model.conv.weight
    x = torch.randn(*IMAGE)
    outcome = run(Layout(), model.eval(), (x,))
    assert outcome.module.conv.weight is outcome.module.other.weight
    assert outcome.module.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert_close(outcome.module(x), model(x), 1e-5)


@settings(max_examples=40, deadline=None)
@given(
    kernels=st.lists(st.sampled_from([(1, 1), (3, 3), (1, 3), (5, 3), (5, 5)]), min_size=1, max_size=3),
    norms=st.lists(st.booleans(), min_size=3, max_size=3),
    biases=st.lists(st.booleans(), min_size=3, max_size=3),
    identity=st.sampled_from(["none", "plain", "norm"]),
    groups=st.sampled_from([1, 2, 4]),
    stride=st.sampled_from([1, 2]),
)
def test_any_branches(
    kernels: list[tuple[int, int]], norms: list[bool], biases: list[bool], identity: str, groups: int, stride: int
) -> None:
    assume(len(kernels) > 1 or identity != "none")
    assume(stride == 1 or identity == "none")

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(
                nn.Conv2d(4, 4, k, stride, (k[0] // 2, k[1] // 2), groups=groups, bias=b)
                for k, b in zip(kernels, biases, strict=False)
            )
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) if norm else nn.Identity() for norm in norms)
            self.norm = nn.BatchNorm2d(4) if identity == "norm" else nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            total = None if identity == "none" else self.norm(x)
            for conv, norm in zip(self.convs, self.norms, strict=False):
                y = norm(conv(x))
                total = y if total is None else total + y
            return total

    torch.manual_seed(0)
    model, x = settle(Sum()).eval(), torch.randn(2, 4, 7, 6)
    outcome = run(FOLDS, model, (x,))
    largest = max(kernels, key=lambda k: k[0] * k[1])
    fits = all(k[0] <= largest[0] and k[1] <= largest[1] for k in kernels)
    assert len(outcome.changes) == fits
    assert_close(outcome.module(x), model(x), 1e-4)
