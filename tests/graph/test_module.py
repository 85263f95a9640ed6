"""The captured form of a module copies, pickles, keeps its state and follows the mode."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.capture import capture
from fxopt.graph import GraphModule, Source
from fxopt.graph.observe import observe


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.second = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4)
        self.unused = nn.Linear(1, 1)
        self.register_buffer("hidden", torch.ones(1), persistent=False)

    def forward(self, x):
        return self.second(self.first(x)) * self.hidden


def program() -> GraphModule:
    model = Model()
    return GraphModule(model, {False: fx.symbolic_trace(model).graph}, "Model")


def two_modes() -> GraphModule:
    graphs = {}
    for mode in (False, True):
        graph = fx.Graph()
        graph.output(graph.call_function(torch.add, (graph.placeholder("x"), int(mode))))
        graphs[mode] = graph
    return GraphModule(nn.Module().eval(), graphs)


def test_the_whole_tree_stays_in_order() -> None:
    assert list(program().state_dict()) == list(Model().state_dict())
    assert [name for name, _ in program().named_modules()] == [name for name, _ in Model().named_modules()]


def test_pickles_functions_that_torch_made_by_dispatch() -> None:
    class Pools(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.adaptive_max_pool2d(F.max_pool2d(x, 2), 1)

    x = torch.randn(2, 3, 8, 8)
    module = capture(Pools(), (x,)).module
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))


def test_pickles_operators_of_torch() -> None:
    class Operators(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.relu(x) + torch.ops.aten.add.Tensor(x, 1)

    x = torch.randn(3)
    module = capture(Operators(), (x,)).module
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), Operators()(x))


def test_copies_and_pickles_with_metadata() -> None:
    module = program()
    node = next(iter(module.graph.nodes))
    node.meta["source"] = Source("/tmp/model.py", 41)
    x = torch.randn(2, 4)
    for duplicate in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(duplicate(x), module(x))
        assert str(next(iter(duplicate.graph.nodes)).meta["source"]) == "model.py:41"
        assert type(duplicate).__name__ == "Model"
        with torch.no_grad():
            duplicate.first.weight.zero_()
        assert not torch.equal(duplicate(x), module(x))


def test_pickles_long_graphs() -> None:
    graph = fx.Graph()
    node = graph.placeholder("x")
    for _ in range(3000):
        node = graph.call_function(torch.neg, (node,))
    graph.output(node)
    module = GraphModule(nn.Module(), {False: graph})
    x = torch.ones(1)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), x)


def test_each_mode_has_its_graph() -> None:
    x = torch.zeros(1)
    for module in (two_modes(), copy.deepcopy(two_modes()), pickle.loads(pickle.dumps(two_modes()))):
        assert [module(x).item(), module.train()(x).item(), module.eval()(x).item()] == [0, 1, 0]
        outer = nn.Sequential(module)
        assert outer.train()(x).item() == 1


class Doubles(nn.Module):
    """Its state has a version, so its own Python code stays at hand."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def get_extra_state(self) -> int:
        return 1

    def set_extra_state(self, state: int) -> None:
        assert state == 1

    def twice(self, x: torch.Tensor) -> torch.Tensor:
        x = self(x)
        return self(x)


def negated(module: GraphModule) -> GraphModule:
    """Whose graph computes something else than the Python code of its original."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    with module.graph.inserting_before(output):
        output.args = (module.graph.call_function(torch.neg, output.args),)
    module.recompile()
    return module


@pytest.mark.parametrize(
    "duplicate",
    [
        lambda module: module,
        copy.copy,
        copy.deepcopy,
        lambda module: pickle.loads(pickle.dumps(module)),
        lambda module: capture(module, (torch.randn(2, 4),)).module,
    ],
    ids=["itself", "copy", "deepcopy", "pickle", "captured again"],
)
def test_a_method_of_the_original_that_calls_it_runs_the_graph(duplicate: Callable[[GraphModule], GraphModule]) -> None:
    x = torch.randn(2, 4)
    module = negated(capture(Doubles(), (x,)).module)
    other = negated(duplicate(capture(Doubles(), (x,)).module))
    for each in (module, other, duplicate(module)):
        assert torch.equal(each.twice(x), each(each(x)))


def test_a_method_of_the_original_that_calls_it_runs_hooks_once() -> None:
    x = torch.randn(2, 4)
    model = Doubles()
    model.register_forward_hook(lambda module, inputs, output: output + 1)
    model.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2,))
    module = capture(model, (x,)).module
    assert torch.equal(module.twice(x), model.twice(x))


def test_observe_sees_every_value() -> None:
    seen: list[str] = []
    module, x = program(), torch.randn(2, 4)
    out = observe(module, (x,), {}, lambda owner, node, value: seen.append(node.name))
    assert torch.equal(out, module(x))
    assert seen == [node.name for node in module.graph.nodes]
