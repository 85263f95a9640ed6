"""Parts of a model whose layers have taken up what stood around them, called by themselves."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.errors import GuardError
from tests.models import ResidualBlock, settle

IMAGE = (2, 4, 8, 8)


class Part(nn.Module):
    """A convolution with something of the caller's around it."""

    def __init__(self, around: Callable[[nn.Module, torch.Tensor], torch.Tensor], **parts: nn.Module):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.around = around
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.around(self, x)


class Gelu(nn.Module):
    """A class of its own, as transformers has for its activations."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x)


def sequence(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), *layers)


def part(around: Callable[..., torch.Tensor], **parts: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Part(around, **{name: make() for name, make in parts.items()})


def pad_first(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return self.conv(F.pad(x, (1, 1, 1, 1)))


SAME: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "a batch norm": ("fuse", lambda: sequence(nn.BatchNorm2d(4))),
    "a batch norm before": ("fuse", lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3))),
    "an activation": ("fuse", lambda: sequence(nn.GELU())),
    "both": ("fuse", lambda: sequence(nn.BatchNorm2d(4), nn.Hardswish(), nn.Conv2d(4, 4, 1), nn.SiLU())),
    "an activation of a class of its own": ("fuse", lambda: sequence(Gelu())),
    "one activation behind two layers": (
        "fuse",
        part(
            lambda self, x: self.act(self.conv2(self.act(self.conv(x)))), act=nn.SiLU, conv2=lambda: nn.Conv2d(4, 4, 1)
        ),
    ),
    "a function that may be called twice": ("fuse", part(lambda self, x: F.relu(self.conv(x)))),
    "a pad": ("layout", lambda: nn.Sequential(nn.ZeroPad2d(1), nn.Conv2d(4, 4, 3))),
}
REFUSED: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "a function": ("fuse", part(lambda self, x: F.gelu(self.conv(x)))),
    "an addition": ("fuse", lambda: ResidualBlock(4, 4)),
    "a pad by a function": ("layout", part(pad_first)),
    "a scale": ("layout", part(lambda self, x: self.conv(x) * 0.5)),
}


def whole(make: Callable[[], nn.Module], training: bool) -> nn.Module:
    torch.manual_seed(0)
    inner = make()
    return settle(nn.Sequential(nn.Sequential(inner), nn.Flatten())).train(training)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SAME)
def test_a_part_computes_what_it_did(name: str, training: bool) -> None:
    passes, make = SAME[name]
    model, x = whole(make, training), torch.randn(*IMAGE)
    result = fxopt.optimize(model, x, passes, devices=())
    assert result.ledger.entries[0].changes or training
    torch.testing.assert_close(result.module.get_submodule("0")(x), model.get_submodule("0")(x), rtol=1e-4, atol=1e-5)
    assert {child.training for child in result.module.modules()} == {training}
    # Places stay: `model.features[3] = ...` replaces what it did.
    assert list(result.module.get_submodule("0.0")._modules) == list(model.get_submodule("0.0")._modules)


@pytest.mark.parametrize("name", REFUSED)
def test_a_part_whose_code_would_compute_something_twice_says_so(name: str) -> None:
    passes, make = REFUSED[name]
    model, x = whole(make, training=False), torch.randn(*IMAGE)
    module = fxopt.optimize(model, x, passes, devices=()).module
    torch.testing.assert_close(module(x), model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(GuardError, match=r"'0' can't be called by itself any more"):
        module.get_submodule("0")(x)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_so_does_that_of_a_copy(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model, x = whole(lambda: ResidualBlock(4, 4), training=False), torch.randn(*IMAGE)
    module = fxopt.optimize(model, x, "fuse", devices=()).module
    copied = duplicate(module)
    torch.testing.assert_close(copied(x), module(x), rtol=0, atol=0)
    with pytest.raises(GuardError, match="'0' can't be called by itself"):
        copied.get_submodule("0")(x)
