"""Nodes know the user's line."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fxopt.capture import capture
from fxopt.errors import GuardError
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


TYPED = """\
class Typed(nn.Module):
    def forward(self, x):
        if x.shape[1] > 3:
            return x.relu()
"""


@pytest.mark.parametrize("file", ["<stdin>", "<ipython-input-3-a1>", "<string>"])
def test_what_is_typed_in_has_lines_and_what_is_generated_has_none(file: str) -> None:
    space: dict[str, Any] = {"nn": nn, "__name__": "__main__"}
    exec(compile(TYPED, file, "exec"), space)
    captured = capture(space["Typed"](), (torch.zeros(1, 4),))
    relu = next(node for node in captured.module.graph.nodes if node.target == "relu")
    assert source_of(relu) == ("" if file == "<string>" else f"{file}:4")
    with pytest.raises(GuardError) as error:
        captured.module(torch.zeros(1, 2))
    where = "" if file == "<string>" else f" ({file}:3)"
    assert f"x.shape[1] > 3{where}, but it is" in str(error.value)
