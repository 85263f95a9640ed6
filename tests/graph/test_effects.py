"""What writes, what aliases, and what may be removed because nothing can see it."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.graph import Effects, GraphModule, Program, Region, eliminate_dead
from fxopt.modules import FakeQuantize, Fused


def region_of(build: Callable[[fx.Graph, fx.Node], object], **modules: nn.Module) -> Region:
    root = nn.Module()
    root.register_buffer("state", torch.zeros(4))
    for name, module in modules.items():
        root.add_module(name, module)
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    return Program(GraphModule(root.eval(), {False: graph})).regions[0]


def names(nodes: object) -> list[str]:
    return [node.name for node in nodes]  # type: ignore[attr-defined]


def call(graph: fx.Graph, target: object, *args: object, **kwargs: object) -> fx.Node:
    if isinstance(target, str):
        return graph.call_method(target, args, kwargs)  # type: ignore[arg-type]
    return graph.call_function(target, args, kwargs)  # type: ignore[arg-type]


WRITES: dict[str, tuple[object, tuple[object, ...], dict[str, object], bool]] = {
    "mul_": ("mul_", (2,), {}, True),
    "iadd": (operator.iadd, (1,), {}, True),
    "setitem": (operator.setitem, (0, 1.0), {}, True),
    "F.relu in place": (F.relu, (), {"inplace": True}, True),
    "F.relu": (F.relu, (), {}, False),
    "add": (operator.add, (1,), {}, False),
    "view": ("view", (-1,), {}, False),
    "dunder": ("__add__", (1,), {}, False),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes(name: str) -> None:
    target, args, kwargs, expected = WRITES[name]
    region = region_of(lambda graph, x: call(graph, target, x, *args, **kwargs))
    x, node, _ = region.graph.nodes
    assert Effects(region).writes(node) == ((x,) if expected else ())


def test_what_is_added_in_place_and_sizes_share_no_memory() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> object:
        length = call(graph, operator.floordiv, call(graph, "size", x, 0), 2)
        made = call(graph, "new_zeros", x, length)
        call(graph, operator.setitem, made, length, 1.0)
        seen = call(graph, "view", x, length, -1)
        added = call(graph, "add_", made, seen)
        return added, seen

    region = region_of(build)
    aliases = Effects(region).aliases()
    found = {node.name: names(sorted(aliases(node))) for node in region.graph.nodes}
    assert found["x"] == ["x", "view"]
    assert found["add_"] == ["new_zeros", "setitem", "add_"]


def test_aliases_follow_views_and_writes() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> object:
        view = call(graph, "view", x, -1)
        fresh = call(graph, torch.sin, view)
        written = call(graph, "mul_", view, 2)
        return fresh, written

    region = region_of(build)
    aliases = Effects(region).aliases()
    x, view, sin, mul, _ = region.graph.nodes
    assert aliases(x) == {x, view, mul}
    assert aliases(sin) == {sin}


RETURNS_ARGUMENT: dict[str, Callable[[fx.Graph, fx.Node], fx.Node]] = {
    "type_as": lambda g, x: call(g, "type_as", x, x),
    "sum_to_size": lambda g, x: call(g, "sum_to_size", x, 4),
    "dropout": lambda g, x: call(g, F.dropout, x, 0.5, False),
    "alpha_dropout": lambda g, x: call(g, F.alpha_dropout, x, 0.5, False),
    "feature_dropout": lambda g, x: call(g, torch.feature_dropout, x, 0.5, False),
    "einsum": lambda g, x: call(g, torch.einsum, "i->i", x),
    "atleast_1d": lambda g, x: call(g, torch.atleast_1d, x),
    "broadcast_tensors": lambda g, x: call(g, torch.broadcast_tensors, x),
    "meshgrid": lambda g, x: call(g, torch.meshgrid, x),
    "cartesian_prod": lambda g, x: call(g, torch.cartesian_prod, x),
    "to_dense": lambda g, x: call(g, "to_dense", x),
    "unsafe_chunk": lambda g, x: call(g, "unsafe_chunk", x, 2),
    "to": lambda g, x: call(g, "to", x, torch.float32),
}


@pytest.mark.parametrize("name", RETURNS_ARGUMENT)
def test_what_may_return_its_argument_shares_memory_with_it(name: str) -> None:
    region = region_of(RETURNS_ARGUMENT[name])
    x, node, _ = region.graph.nodes
    assert Effects(region).may_alias(node) == (x,)


def test_a_product_by_einsum_shares_no_memory_with_its_operands() -> None:
    region = region_of(lambda graph, x: call(graph, torch.einsum, "ij,jk->ik", x, call(graph, "relu", x)))
    *_, product, _ = region.graph.nodes
    assert Effects(region).may_alias(product) == ()


@pytest.mark.parametrize("function", [operator.and_, operator.or_])
def test_operators_whose_names_are_words_of_python_write_into_nothing(function: object) -> None:
    region = region_of(lambda graph, x: call(graph, function, x, x))
    _, node, _ = region.graph.nodes
    effects = Effects(region)
    assert effects.writes(node) == effects.may_alias(node) == ()
    assert effects.is_known(node)


def test_reads_of_one_memory_alias() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> object:
        return graph.create_node("get_attr", "state"), graph.create_node("get_attr", "state")

    region = region_of(build)
    _, one, two, _ = region.graph.nodes
    assert Effects(region).aliases()(one) == {one, two}


def test_reads_of_one_sparse_buffer_alias() -> None:
    sparse = nn.Module()
    sparse.register_buffer("adjacency", torch.eye(4).to_sparse())

    def build(graph: fx.Graph, x: fx.Node) -> object:
        return graph.create_node("get_attr", "sparse.adjacency"), graph.create_node("get_attr", "sparse.adjacency")

    region = region_of(build, sparse=sparse)
    _, one, two, _ = region.graph.nodes
    assert Effects(region).aliases()(one) == {one, two}


def test_written_between() -> None:
    def build(graph: fx.Graph, x: fx.Node) -> object:
        start = call(graph, torch.sin, x)
        view = call(graph, "view", x, -1)
        write = call(graph, "mul_", view, 2)
        return start, call(graph, torch.cos, write)

    region = region_of(build)
    x, sin, _, mul, cos, _ = region.graph.nodes
    effects = Effects(region)
    assert effects.written_between(x, sin, cos) is mul
    assert effects.written_between(x, sin, mul) is None
    assert effects.written_between(sin, x, cos) is None


DEAD: dict[str, tuple[Callable[[fx.Graph, fx.Node], object], list[str]]] = {
    "unused": (lambda g, x: (call(g, torch.sin, x), x)[1], ["sin"]),
    "chain": (lambda g, x: (call(g, torch.cos, call(g, torch.sin, x)), x)[1], ["sin", "cos"]),
    "write to an input": (lambda g, x: (call(g, "mul_", x, 2), x)[1], []),
    "write through a view": (
        lambda g, x: (y := call(g, torch.sin, x), call(g, "mul_", call(g, "view", y, -1), 2), y)[2],
        [],
    ),
    "write to what is dead": (lambda g, x: (call(g, "mul_", call(g, torch.sin, x), 2), x)[1], ["sin", "mul_"]),
    "write to a buffer": (lambda g, x: (call(g, "add_", g.create_node("get_attr", "state"), 1), x)[1], []),
    "random": (lambda g, x: (call(g, torch.rand_like, x), x)[1], []),
    "random by a distribution": (lambda g, x: (call(g, torch.binomial, x, x), x)[1], []),
    "dropout in evaluation": (lambda g, x: (call(g, F.dropout, x, 0.5, False), x)[1], ["dropout"]),
    "dropout in training": (lambda g, x: (call(g, F.dropout, x, 0.5, True), x)[1], []),
    "of Python alone": (
        lambda g, x: (call(g, F.interpolate, call(g, F.normalize, x), 8), x)[1],
        ["normalize", "interpolate"],
    ),
    "byte": (lambda g, x: (call(g, "byte", x), x)[1], ["byte"]),
    "unknown": (lambda g, x: (call(g, see, x), x)[1], []),
    "statistics": (lambda g, x: (call(g, F.batch_norm, x, x, x, training=True), x)[1], []),
}


def see(value: object) -> None:
    """A call that nothing is known about."""


@pytest.mark.parametrize("name", DEAD)
def test_eliminate_dead(name: str) -> None:
    build, expected = DEAD[name]
    region = region_of(build)
    assert names(eliminate_dead(region)) == expected
    region.graph.lint()


MODULES: dict[str, tuple[nn.Module, bool]] = {
    "relu": (nn.ReLU(), True),
    "relu in place": (nn.ReLU(inplace=True), False),
    "batch norm in evaluation": (nn.BatchNorm1d(4).eval(), True),
    "reflection pad": (nn.ReflectionPad1d(1), True),
    "circular pad": (nn.CircularPad1d(1), True),
    "gated": (nn.GLU(), True),
    "recurrent": (nn.GRU(4, 4), True),
    "loss": (nn.MSELoss(), True),
    "fused": (Fused.of(nn.Linear(4, 4)), True),
    "embedding": (nn.Embedding(4, 4), True),
    "embedding that renormalises": (nn.Embedding(4, 4, max_norm=1.0), False),
    "fake quantiser": (FakeQuantize(), True),
    "unknown": (nn.Module(), False),
}


@pytest.mark.parametrize("name", MODULES)
def test_dead_modules(name: str) -> None:
    module, dies = MODULES[name]
    region = region_of(lambda g, x: (g.create_node("call_module", "m", (x,)), x)[1], m=module)
    assert bool(eliminate_dead(region)) is dies


@pytest.mark.parametrize(
    "module",
    [
        nn.BatchNorm1d(4),
        nn.Dropout(),
        Fused.of(nn.Linear(4, 4), bn=nn.BatchNorm1d(4)),
        nn.LSTM(4, 4, num_layers=2, dropout=0.1),
        nn.MultiheadAttention(4, 1, dropout=0.1),
    ],
)
def test_modules_that_live_in_training(module: nn.Module) -> None:
    region = region_of(lambda g, x: (g.create_node("call_module", "m", (x,)), x)[1], m=module)
    module.train()
    assert not eliminate_dead(region)
    module.eval()
    assert eliminate_dead(region)


def test_a_hooked_module_lives() -> None:
    module = nn.ReLU()
    module.register_forward_hook(lambda *_: None)
    region = region_of(lambda g, x: (g.create_node("call_module", "m", (x,)), x)[1], m=module)
    assert not eliminate_dead(region)
