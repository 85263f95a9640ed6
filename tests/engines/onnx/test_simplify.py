"""ONNX files hold what depends on inputs, once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fxopt
from tests.engines.test_others import needs


class Repeats(nn.Module):
    """Computes a constant at each call, and a sine and a shape twice."""

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(4, dtype=x.dtype).cos() * 2
        rows = x.sin().reshape(x.shape[0], -1)
        return rows + steps.repeat(3) + x.sin().reshape(x.shape[0], -1)


@pytest.mark.parametrize("batch", [1, 3])
def test_constants_are_folded_and_nothing_is_computed_twice(batch: int, tmp_path: Path) -> None:
    needs("onnxruntime")
    import onnx

    x = torch.randn(batch, 3, 4)
    executable = fxopt.lower(Repeats().eval(), x, "onnxruntime")
    torch.testing.assert_close(executable(x), Repeats()(x))
    executable.save(tmp_path)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert Counter(node.op_type for node in graph.node) == {"Sin": 1, "Reshape": 1, "Add": 2}
    assert {initial.name for initial in graph.initializer} == {name for node in graph.node for name in node.input} - {
        "x",
        *(name for node in graph.node for name in node.output),
    }
