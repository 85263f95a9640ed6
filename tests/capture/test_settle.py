"""What is left whole where recording meets the same obstacle again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxopt.capture.settle import further
from fxopt.capture.state import State

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


def test_a_state_holds_the_tensors_of_attributes_so_that_they_need_no_second_recording() -> None:
    module = nn.Module()
    module.table, module.parts = torch.zeros(2), {"list": [torch.zeros(3)]}
    state = State(module)
    assert state.holds(module.table)
    assert state.holds(module.parts["list"][0])
    assert not state.holds(torch.zeros(2))
