"""The smallest model of each timm family, where a family is a file of timm/models."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from fxopt.inputs import Inputs
from fxopt.torchvision_operators import declare_missing
from zoo_models.specimen import Built, Specimen


def specimens() -> Iterator[Specimen]:
    """One of each family."""
    declare_missing()
    import timm

    for family in sorted(timm.list_modules()):
        names = timm.list_models(module=family)
        if names:
            yield Specimen(family, "timm", "vision", functools.partial(_build, tuple(names)))


def _build(names: tuple[str, ...]) -> Built:
    module, (channels, height, width) = _made(_smallest(names))

    def inputs(batch: int, more: int = 0) -> Inputs:
        return Inputs((torch.randn(batch, channels, height + more, width + more),))

    return module, {"example": inputs(2), "batch": inputs(3), "size": inputs(2, 32)}


def _made(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """A model and the smallest of a few images that it takes, in evaluation mode."""
    import timm

    def make(**options: Any) -> Any:
        torch.manual_seed(0)
        return timm.create_model(name, pretrained=False, **options).eval()

    whole = make()
    channels, height, width = whole.pretrained_cfg["input_size"]
    if whole.pretrained_cfg.get("fixed_input_size"):
        for side in _SIDES:
            with suppress(Exception):  # whatever a constructor refuses
                module = make(img_size=side)
                if side < height and _runs(module, channels, side, side):
                    return module, (channels, side, side)
        return whole, (channels, height, width)
    sizes = [(64, 64), (128, 128), (126, 126), (height, width)]
    height, width = next(size for size in sizes if size == sizes[-1] or _runs(whole, channels, *size))
    return whole, (channels, height, width)


def _runs(module: nn.Module, channels: int, height: int, width: int) -> bool:
    try:
        with torch.no_grad():
            copy.deepcopy(module)(torch.randn(2, channels, height, width))
    except Exception:  # whatever a model raises on an image that is too small
        return False
    return True


def _smallest(names: tuple[str, ...]) -> str:
    """By what names tell of sizes; making all 1,200 models to count their parameters takes minutes."""

    def rank(name: str) -> tuple[int, int]:
        return next((rank for rank, word in enumerate(_SMALL) if word in name), len(_SMALL)), len(name)

    return min(names, key=rank)


# Sides that patches of 16, of 14, and of 3 by 3 patches of 14 divide.
_SIDES = (112, 128, 126)
_SMALL = "test pico atto femto nano xxt xxs tiny xs small mini 050 035 lite s0 b0 t0 0".split()
