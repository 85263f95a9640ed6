"""Idioms that recording has met, each in a module as small as it gets."""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fxopt.capture import capture
from fxopt.capture.call import Call
from fxopt.capture.describe import describe
from fxopt.capture.record import record
from fxopt.errors import GuardError
from fxopt.graph.observe import observe
from tests.capture.agree import assert_same


@dataclass
class Layer:
    kept: torch.Tensor | None = None
    filled: int = 0
    is_full: bool = False
    parts: dict[str, torch.Tensor] = field(default_factory=dict)


@dataclass
class Cache:
    layers: list[Layer] = field(default_factory=list)


def cache(filled: int) -> Cache:
    return Cache([Layer(torch.ones(2, filled), filled)])


class CountsInCache(nn.Module):
    """A number among the attributes of an input."""

    def forward(self, x, cache):
        layer = cache.layers[0]
        layer.filled += x.shape[1]
        layer.kept = torch.cat([layer.kept, x], 1)
        return x * layer.filled


class FillsDict(nn.Module):
    """A dict within an object is written into."""

    def forward(self, x, cache):
        cache.layers[0].parts["last"] = x * 2
        return x


class AppendsToList(nn.Module):
    """A list that was given is longer when it is used."""

    def forward(self, xs):
        xs.append(xs[0] + 1)
        return torch.cat(xs)


class Opaque(nn.Module):
    def forward(self, x, cache):
        cache.layers[0].kept = x * 3
        if x.sum() > 0:
            return x + 1
        return x - 1


class CallsOpaqueWithCache(nn.Module):
    """What an opaque part writes into an object is read by the graph around it."""

    def __init__(self):
        super().__init__()
        self.opaque = Opaque()

    def forward(self, x, cache):
        y = self.opaque(x, cache)
        return y + cache.layers[0].kept


class MakesCache(nn.Module):
    """An object made in the forward changes between the parts that it is handed to."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Opaque(), Opaque()

    def forward(self, x):
        made = cache(1)
        y = self.first(x, made)
        made.layers[0].kept = made.layers[0].kept + y
        z = self.second(made.layers[0].kept, made)
        return z, made


class NumpyNumber(nn.Module):
    def forward(self, x):
        return x * np.sqrt(2.0) + x / np.float32(3)


class ReflectedPower(nn.Module):
    def forward(self, x):
        return x**2 + 2**x + abs(x) - (-x)


class PythonType(nn.Module):
    def forward(self, x):
        return x + torch.zeros(x.shape, dtype=float).sum() + torch.ones_like(x, dtype=bool)


class ScattersByValue(nn.Module):
    """The shape of a result is that of the first argument, however many rows were chosen by their values."""

    def forward(self, x):
        chosen = (x[:, 0] > 0).nonzero()[:, 0]
        y = torch.zeros_like(x).index_add(0, chosen, x[chosen])
        return y * 2 if y.shape[1] > 2 else y


class AsksByKeyword(nn.Module):
    """A decorator looks for an argument among the keyword ones."""

    def forward(self, *args, **kwargs):
        if "scale" not in kwargs:
            raise TypeError("scale is a keyword")
        return args[0] * kwargs["scale"]


class WarnsByValue(nn.Module):
    """Leaves out a warning of values while it is exported."""

    def forward(self, x):
        if not torch.compiler.is_exporting() and 0 in x:
            warnings.warn("there is padding", stacklevel=2)
        return x + 1


class WarnsUnlessCompiled(nn.Module):
    """Leaves out a warning of values while it is compiled."""

    def forward(self, x):
        if not torch.compiler.is_compiling() and 0 in x:
            warnings.warn("there is padding", stacklevel=2)
        return x + 1


class CompilesOtherwise(nn.Module):
    """Leaves out a warning of values while it is exported, and rounds otherwise while it is compiled."""

    def forward(self, x):
        if not torch.compiler.is_exporting() and 0 in x:
            warnings.warn("there is padding", stacklevel=2)
        return x * (1 / 7) if torch.compiler.is_compiling() else x / 7


class AnswersDifferently(nn.Module):
    """Computes something else while it is exported."""

    def forward(self, x):
        if torch.compiler.is_exporting():
            return x
        return x + 1 if x.sum() > 0 else x - 1


class Catches(nn.Module):
    """Goes on where a layer or a function raises."""

    def __init__(self, function):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.function = function

    def forward(self, x):
        try:
            return self.function(self.fc, x)
        except RuntimeError:
            return x.sum()


X = torch.arange(1.0, 7.0).reshape(2, 3)

SAME = [
    (CountsInCache(), lambda n: (torch.ones(2, n), cache(n + 1))),
    (FillsDict(), lambda n: (torch.ones(2, n), cache(3))),
    (AppendsToList(), lambda n: ([torch.ones(n)],)),
    (CallsOpaqueWithCache(), lambda n: (torch.ones(2, n), cache(3))),
    (MakesCache(), lambda n: (torch.ones(2, n),)),
    (NumpyNumber(), lambda n: (torch.ones(2, n),)),
    (ReflectedPower(), lambda n: (torch.ones(2, n),)),
    (PythonType(), lambda n: (torch.ones(2, n),)),
    (ScattersByValue(), lambda n: (torch.randn(5, n, generator=torch.Generator().manual_seed(n)),)),
    (WarnsByValue(), lambda n: (torch.ones(2, n),)),
    (WarnsUnlessCompiled(), lambda n: (torch.ones(2, n),)),
    (CompilesOtherwise(), lambda n: (torch.full((2, n), n - 3.0),)),
    (AnswersDifferently(), lambda n: (torch.ones(2, n),)),
]


def parts(value: Any) -> list[Any]:
    if isinstance(value, (Cache, Layer)):
        return [type(value), *parts(vars(value))]
    if isinstance(value, dict):
        return [*value, *(part for item in value.values() for part in parts(item))]
    if isinstance(value, (list, tuple)):
        return [len(value), *(part for item in value for part in parts(item))]
    return [value.tolist() if isinstance(value, torch.Tensor) else (type(value), value)]


@pytest.mark.parametrize(("module", "arguments"), SAME, ids=[type(module).__name__ for module, _ in SAME])
@pytest.mark.parametrize("size", [4, 6])
def test_same_as_eager_at_captured_and_at_another_size(module, arguments, size):
    captured = capture(module, arguments(4))
    expected, actual = arguments(size), arguments(size)
    assert parts(captured.module(*actual)) == parts(module(*expected))
    assert parts(actual) == parts(expected), "what was given was left otherwise"


WHOLE = [module for module, _ in SAME if not isinstance(module, (CallsOpaqueWithCache, MakesCache, AnswersDifferently))]


@pytest.mark.parametrize("module", WHOLE, ids=[type(module).__name__ for module in WHOLE])
def test_all_of_it_is_in_the_graph(module):
    arguments = next(make for other, make in SAME if other is module)
    assert capture(module, arguments(4)).opaque == ()


@pytest.mark.parametrize("function", [lambda fc, x: x.view(3, 2), lambda fc, x: fc(x)])
def test_a_part_that_catches_an_error_of_torch_is_opaque(function):
    module = Catches(function)
    captured = capture(module, (torch.ones(2, 5),))
    assert captured.opaque[0].reason.startswith("it catches the RuntimeError of '")
    for x in (torch.ones(2, 5), X):
        assert_same(module(x), captured.module(x))


def test_a_question_that_operators_turn_down_is_no_error_that_is_caught():
    assert capture(Catches(lambda fc, x: x if x == "text" else fc(x)), (X,)).opaque == ()


def test_the_exported_path_is_told():
    captured = capture(WarnsByValue(), (torch.ones(2, 3),))
    assert "recorded as it runs when it is exported" in captured.notes[0]


def test_the_exported_path_is_not_taken_where_it_computes_something_else():
    captured = capture(AnswersDifferently(), (torch.ones(2, 3),))
    assert [part.path for part in captured.opaque] == [""]


def test_arguments_are_passed_as_they_were_given():
    captured = capture(AsksByKeyword(), (X,), {"scale": 3})
    assert torch.equal(captured.module(X, scale=4), X * 4)


class TakesOptions(nn.Module):
    def forward(self, x, **options):
        return x * options.get("scale", 2)


def test_a_keyword_beyond_those_of_the_example_is_guarded():
    captured = capture(TakesOptions(), (X,))
    assert torch.equal(captured.module(X), X * 2)
    with pytest.raises(GuardError, match=r"options has the keys \[\] \(an input\), but it is \['scale'\] here"):
        captured.module(X, scale=3)
    assert torch.equal(torch.export.export(captured.module, (X,)).module()(X), X * 2)
    recaptured = capture(TakesOptions(), (X,), on_guard_failure="recapture").module
    assert torch.equal(recaptured(X, scale=3), X * 3)


def test_a_signature_has_keywords_that_are_taken_alone():
    captured = capture(TakesOptions(), (X,))
    assert str(inspect.signature(captured.module.forward)) == "(x)"
    assert str(inspect.signature(copy.deepcopy(captured.module).forward)) == "(x)"
    given = capture(TakesOptions(), (X,), {"scale": 3}).module
    assert str(inspect.signature(given.forward)) == "(x, **options)"
    assert torch.equal(observe(captured.module, (X,), {}, lambda *seen: None), X * 2)


def sets_scale(forward):
    @functools.wraps(forward)
    def wrapper(self, *args, **kwargs):
        kwargs["scale"] = kwargs.get("scale") or 2
        return forward(self, *args, **kwargs)

    return wrapper


class OpaqueSetsScale(nn.Module):
    @sets_scale
    def forward(self, x, scale=None):
        return x * scale if x.sum() > 0 else x


def test_an_opaque_root_is_called_as_it_was_called():
    captured = capture(OpaqueSetsScale(), (X,))
    assert captured.opaque
    assert torch.equal(captured.module(X), X * 2)
    assert torch.equal(captured.module(X, scale=3), X * 3)


class ResizesBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(1), persistent=False)

    def forward(self, x):
        if len(self.table) != x.shape[1]:
            self.table = torch.arange(x.shape[1])
        return x + self.table


class Grows(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(1))

    def forward(self, x):
        if len(self.table) != x.shape[1]:
            self.table = torch.arange(x.shape[1]).float()
        return x + self.table


def test_a_buffer_that_the_forward_replaces_by_a_larger_one_is_replaced_in_the_graph_too():
    module = Grows()
    captured = capture(module, (X,))
    assert captured.opaque == ()
    assert torch.equal(module.table, torch.zeros(1))
    for columns in (X.shape[1], X.shape[1], 2 * X.shape[1]):
        x = torch.randn(3, columns)
        assert torch.equal(captured.module(x), module(x))
        assert torch.equal(captured.module.get_buffer("table"), module.table)
    assert torch.equal(copy.deepcopy(captured.module)(X), module(X))


class Reassigns(nn.Module):
    """Replaces its buffers by one of the functions below, and returns what the function does."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.register_buffer("now", torch.arange(4.0))
        self.register_buffer("then", torch.zeros(4))

    def forward(self, x):
        return self.function(self, x)


def old_value(module, x):
    before = module.now
    module.now = module.now + x
    return {"before": before, "now": module.now}


def old_view(module, x):
    before = module.now[1:]
    module.now = module.now + x
    return before * 2, before


def moved_on(module, x):
    module.then, module.now = module.now, module.now + x
    return module.then


def swapped(module, x):
    module.then, module.now = module.now, module.then
    return x + module.now


def turned(module, x):
    module.now = module.now.view(2, 2).t().reshape(4)
    return x


@pytest.mark.parametrize("function", [old_value, old_view, moved_on, swapped, turned])
def test_the_old_value_of_a_buffer_that_is_replaced_stays_what_it_was(function):
    module, x = Reassigns(function), torch.ones(4)
    captured = capture(module, (x,))
    assert captured.opaque == ()
    for _ in range(3):
        assert parts(captured.module(x)) == parts(module(x))
        assert parts(dict(captured.module.named_buffers())) == parts(dict(module.named_buffers()))


class OpaqueAroundResized(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = ResizesBuffer()

    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else x


class CallsOpaqueAroundResized(nn.Module):
    def __init__(self):
        super().__init__()
        self.outer = OpaqueAroundResized()

    def forward(self, x):
        return self.outer(x) + 1


def test_a_buffer_replaced_within_an_opaque_part_ends_the_recording():
    module = CallsOpaqueAroundResized()
    captured = capture(module, (X,))
    assert torch.equal(captured.module(X), module(X))
    assert torch.equal(captured.module(X[:, :2]), module(X[:, :2]))


def test_an_object_whose_tensors_have_a_history_is_left_as_it_was():
    given = cache(2)
    given.layers[0].kept = given.layers[0].kept.requires_grad_() * 2
    captured = capture(CountsInCache(), (X, given))
    assert given.layers[0].filled == 2
    assert given.layers[0].kept.shape == (2, 2)
    assert parts(captured.module(X, cache(3))) == parts(CountsInCache()(X, cache(3)))


class BranchesOnFlag(nn.Module):
    def forward(self, x, cache):
        return x if cache.layers[0].is_full else x * 2


def test_a_flag_of_an_input_object_is_guarded():
    captured = capture(BranchesOnFlag(), (X, cache(2)))
    full = cache(2)
    full.layers[0].is_full = True
    with pytest.raises(GuardError, match=r"cache\.layers\[0\]\.is_full is False"):
        captured.module(X, full)


class BranchesOnNumber(nn.Module):
    def forward(self, x, cache):
        return x if cache.layers[0].filled > 3 else x * 2


def test_a_decision_on_a_number_of_an_input_object_is_guarded():
    captured = capture(BranchesOnNumber(), (X, cache(2)))
    assert torch.equal(captured.module(X, cache(3)), X * 2)
    with pytest.raises(GuardError, match=r"cache\.layers\[0\]\.filled <= 3"):
        captured.module(X, cache(4))


class ReturnsSizes(nn.Module):
    def forward(self, x):
        return {"width": x.shape[1], "cache": Cache([Layer(x, x.shape[0])])}


def test_recorded_outputs_hold_plain_numbers():
    output = record(ReturnsSizes(), Call((X,))).output
    assert type(output["width"]) is int
    assert type(output["cache"].layers[0].filled) is int


def test_nodes_are_described_as_their_user_writes_them():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    assert describe(graph.call_function(getattr, (x, "kept"))) == "x.kept"
    assert describe(graph.call_method("size", (x, 1))) == "x.shape[1]"


class ManyDropouts(nn.Module):
    """Each drops of the same, as for a loss over several samples."""

    def __init__(self):
        super().__init__()
        self.drops = nn.ModuleList([nn.Dropout(0.5), nn.Dropout(0.5)])

    def forward(self, x):
        hidden = x * 2
        return [drop(hidden) for drop in self.drops] + [hidden]


class Leaves(nn.Module):
    """Gives its input back where nothing is to be done."""

    def forward(self, x):
        return x if x.sum() < 0 else x + 1


class LeavesInPair(nn.Module):
    def forward(self, x):
        return (x, None) if x.sum() < 0 else (x + 1, None)


class AddsWhatIsLeft(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        hidden = x * 2
        left = self.part(hidden)
        return hidden * 3 + (left[0] if isinstance(left, tuple) else left)


class Converts(nn.Module):
    def forward(self, x):
        hidden = x * 2
        return hidden, hidden.to(torch.float32).sum()


@pytest.mark.parametrize(
    ("module", "training"),
    [(ManyDropouts(), True), (AddsWhatIsLeft(Leaves()), False), (AddsWhatIsLeft(LeavesInPair()), False)],
    ids=["dropouts", "opaque", "opaque, in a tuple"],
)
def test_what_is_given_back_for_the_example_is_a_value_of_its_own(module, training):
    captured = capture(module.eval(), (-X.abs(),)).module
    results = []
    for each in (captured, module):
        torch.manual_seed(0)
        results.append(each.train(training)(X.abs()))
    assert_same(*results)


def test_what_a_conversion_leaves_as_it_is_may_be_in_fewer_bits_later():
    captured = capture(Converts(), (X,)).module
    hidden, total = captured(X.bfloat16())
    assert (hidden.dtype, total.dtype) == (torch.bfloat16, torch.float32)


class WritesByOperator(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("met", torch.zeros(1, dtype=torch.bool))

    def forward(self, x):
        scale = 2 if self.met.any() else 1
        self.met |= torch.ones(1, dtype=torch.bool)
        return x * scale


def test_a_decision_on_a_buffer_that_an_operator_writes_is_taken_again():
    module = WritesByOperator()
    captured = capture(module, (X,)).module
    for _ in range(2):
        assert torch.equal(captured(X), module(X))


def test_attributes_that_a_forward_deletes_are_deleted_in_their_order() -> None:
    class Kept:
        def __init__(self) -> None:
            self.first, self.second, self.third, self.fourth = torch.ones(4, 2)

    class Dropping(nn.Module):
        def forward(self, x: torch.Tensor, kept: Kept) -> torch.Tensor:
            y = x + kept.first * kept.second * kept.third * kept.fourth
            del kept.fourth, kept.third, kept.second, kept.first
            return y

    graph = capture(Dropping(), (torch.ones(2), Kept())).module.graph
    deleted = [node.args[1] for node in graph.nodes if node.target is delattr]
    assert deleted == ["first", "second", "third", "fourth"]
