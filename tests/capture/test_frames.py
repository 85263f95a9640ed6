"""Nodes know the user's line."""

from __future__ import annotations

import torch
from torch import nn

from fxopt.capture import capture
from fxopt.graph import source_of
from fxopt.torchvision_operators import declare_missing


def test_a_library_whose_name_begins_with_torch_is_the_users_code() -> None:
    declare_missing()
    import torchvision

    module = capture(torchvision.models.squeezenet1_1(weights=None).eval(), (torch.zeros(1, 3, 32, 32),)).module
    cat = next(node for node in module.graph.nodes if node.target is torch.cat)
    assert source_of(cat).startswith("squeezenet.py:")


def test_modules_of_torch_alone_have_no_line_of_the_users() -> None:
    module = capture(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), (torch.zeros(1, 2),)).module
    assert {source_of(node) for node in module.graph.nodes if node.op == "call_module"} == {""}
