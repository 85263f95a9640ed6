"""What is left whole where recording meets the same obstacle again."""

from __future__ import annotations

import pytest
from torch import nn

from fxopt.capture.settle import further

REASON = ("it decides on a value", "model.py:1")


def layers() -> nn.Module:
    root = nn.Module()
    root.encoder = nn.Module()
    root.encoder.layer = nn.ModuleList([nn.Sequential(nn.Linear(1, 1)), nn.Sequential(nn.Linear(1, 1))])
    return root


@pytest.mark.parametrize(
    ("blocked", "opaque", "whole"),
    [
        ("encoder.layer.0.0", [], "encoder.layer.0.0"),
        ("encoder.layer.0.0", ["encoder.layer.0.0"], "encoder.layer.0"),
        ("encoder.layer.0.0", ["encoder.layer.0"], "encoder"),
        ("encoder.layer.0", ["encoder.layer.0"], "encoder"),
        ("encoder.layer.1", ["encoder"], ""),
        ("", ["encoder"], ""),
    ],
)
def test_each_attempt_leaves_more_whole_than_the_one_before(blocked: str, opaque: list[str], whole: str) -> None:
    assert further(layers(), {blocked: REASON}, dict.fromkeys(opaque, REASON)) == {whole: REASON}
