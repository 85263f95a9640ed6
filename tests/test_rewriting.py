"""What nothing reads goes behind a pass; shapes are written by one call, and again only where something changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import fxopt
from fxopt import rewriting
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.modules import FakeQuantize, Mask
from fxopt.rewriting import propagate_shapes
from tests.capture.odd import InnerGradient


def taller(module: GraphModule) -> None:
    layer = module.get_submodule("0")
    layer.weight, layer.bias = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4))


def double(module: GraphModule) -> None:
    module.double()


def without_metadata(module: GraphModule) -> None:
    del next(iter(module.graph.nodes)).meta["tensor_meta"]


def another_node(module: GraphModule) -> None:
    output = next(node for node in module.graph.nodes if node.op == "output")
    with module.graph.inserting_before(output):
        output.args = (module.graph.call_function(torch.sum, (output.args[0], 1)),)
    module.recompile()


X = torch.ones(2, 3)
CHANGES: dict[str, tuple[Callable[[GraphModule], None] | None, torch.Tensor, bool]] = {
    "nothing": (None, X + 1, False),
    "the batch": (None, torch.ones(4, 3), True),
    "strides of the input": (None, torch.ones(3, 2).T, True),
    "a parameter": (taller, X, True),
    "the dtype": (double, X.double(), True),
    "what a node holds": (without_metadata, X, True),
    "the graph": (another_node, X, True),
}


def seen(node: torch.fx.Node) -> Any:
    meta = node.meta["tensor_meta"]
    return meta.shape, meta.dtype, meta.stride


@pytest.mark.parametrize("name", CHANGES)
def test_a_module_is_called_for_its_shapes_again_where_something_changed(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, x, again = CHANGES[name]
    original = fxopt.capture(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), X).module
    propagate_shapes(original, Inputs.of(X))
    module = copy.deepcopy(original)
    if change is not None:
        change(module)
    called = Mock(wraps=rewriting.observe)
    monkeypatch.setattr(rewriting, "observe", called)
    propagate_shapes(module, Inputs.of(x))
    assert called.called is again
    last = [node for node in module.graph.nodes if node.op != "output"][-1]
    y = module(x)
    assert seen(last) == (y.shape, y.dtype, y.stride())


def test_shapes_of_gradients_are_found_in_training() -> None:
    captured = fxopt.capture(InnerGradient().train(), torch.ones(2, 4))
    propagate_shapes(captured.module, captured.inputs)
    assert captured.module.meta["shapes_of"]


class Unread(nn.Module):
    """Computes something that no output needs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.layer = nn.Parameter(torch.ones(3, 3)), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _ = x @ self.weight
        return self.layer(x)


@pytest.mark.parametrize("passes", ["sparsify{amount=0.5}", "qat"])
def test_what_a_pass_puts_where_nothing_reads_it_goes_with_what_was_there(passes: str) -> None:
    result = fxopt.optimize(Unread().eval(), X, passes, devices=())
    calls = {str(node.target) for node in result.module.graph.nodes if node.op == "call_module"}
    ours = [name for name, child in result.module.named_modules() if isinstance(child, (Mask, FakeQuantize))]
    assert all(name in calls or name.startswith("layer.") for name in ours)
    assert not any("weight." in name and not name.startswith("layer.") for name in result.module.state_dict())
