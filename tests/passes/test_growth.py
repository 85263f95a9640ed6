"""The work of a pass grows with the model, and not with its square."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.capture import capture
from fxopt.pipeline import run_passes
from fxopt.spec import parse


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.bn(self.conv(x)).relu().transpose(1, 3)).transpose(1, 3) + x


def calls(before: str, spec: str, blocks: int) -> int:
    """How many calls of Python functions the passes make, once those `before` have run; it takes no clock."""
    module = nn.Sequential(*(Block() for _ in range(blocks))).eval()
    captured = capture(module, (torch.randn(2, 4, 4, 4),))
    if before:
        run_passes(captured, parse(before))
    counted = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal counted
        counted += event == "call"

    passes, outer = parse(spec), sys.getprofile()
    sys.setprofile(count)
    try:
        run_passes(captured, passes)
    finally:
        sys.setprofile(outer)
    return counted


@pytest.mark.parametrize(
    ("before", "spec"),
    [
        ("", "clean"),
        ("", "merge,attention,layout,fuse"),
        ("", "cast{dtype=bf16}"),
        ("", "qat"),
        ("qat", "quantize-freeze"),
        ("", "sparsify"),
        ("sparsify", "sparsify-bake"),
        ("", "lora"),
        ("lora", "lora-merge"),
    ],
)
def test_twice_the_model_is_twice_the_work(before: str, spec: str) -> None:
    calls(before, spec, 1)  # imports, and what is read once
    assert calls(before, spec, 32) < 2.15 * calls(before, spec, 16)
