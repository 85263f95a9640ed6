"""What every pass must do, whatever it is for."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
from torch import nn

from fxopt import spec
from fxopt.contract import Change, Pass, Promise, Skip
from fxopt.graph import GraphModule
from fxopt.registry import available
from passes import PASSES
from tests.models import STATIC, ConvBlock, PairTwice
from tests.passes.programs import assert_close, captured, rewrite

every_pass = pytest.mark.parametrize("kind", PASSES, ids=lambda kind: kind.name)


def empty() -> GraphModule:
    graph = fx.Graph()
    graph.output(graph.placeholder("x"))
    return GraphModule(nn.Module(), {False: graph})


def frozen() -> nn.Module:
    return nn.Sequential(ConvBlock(3, 4), nn.Dropout(), nn.Conv2d(4, 4, 1)).requires_grad_(False).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "no match": (lambda: nn.Sequential(nn.Softmax(-1)).eval(), (2, 3)),
    "shared": (lambda: PairTwice().eval(), (2, 4, 6, 6)),
    "frozen": (frozen, (2, 3, 8, 8)),
    "training": (lambda: ConvBlock(3, 4).train(), (2, 3, 8, 8)),
}


def test_passes_are_found() -> None:
    assert {kind.name: kind for kind in PASSES}.items() <= dict(available()).items()
    assert len({kind.name for kind in PASSES}) == len(PASSES)


@every_pass
def test_says_what_it_is(kind: type[Pass]) -> None:
    assert kind.name == kind.name.lower()
    assert isinstance(kind.promise, Promise)
    assert kind.__doc__
    parameters = kind.__dataclass_params__  # type: ignore[attr-defined]
    assert parameters.frozen
    assert all(field.metadata.get("help") for field in dataclasses.fields(kind))  # type: ignore[arg-type]


@every_pass
def test_an_empty_graph_stays(kind: type[Pass]) -> None:
    outcome = rewrite(kind(), empty())
    assert not outcome.changes
    assert not outcome.skips
    assert outcome.module(3) == 3


@every_pass
def test_without_a_match_nothing_changes(kind: type[Pass]) -> None:
    factory, shape = MODELS["no match"]
    program = captured(factory(), (torch.randn(*shape),))
    before = str(program.graph)
    outcome = rewrite(kind(), program)
    assert not outcome.changes
    assert str(program.graph) == before


@every_pass
@pytest.mark.parametrize("name", MODELS)
def test_keeps_its_promise(kind: type[Pass], name: str) -> None:
    factory, shape = MODELS[name]
    torch.manual_seed(0)
    model, x = factory(), torch.randn(*shape)
    state = copy.deepcopy(model.state_dict())
    program = captured(model, (x,))
    outcome = rewrite(kind(), program)
    assert all(isinstance(item, Change) and item.what and item.where for item in outcome.changes)
    assert all(isinstance(item, Skip) and item.reason and item.where for item in outcome.skips)
    assert_close(model.state_dict(), state, 0)
    reference = copy.deepcopy(model)
    actual, expected = program(x), reference(x)
    tolerance = {Promise.EXACT: 0.0, Promise.CLOSE: 1e-4, Promise.CHANGES: 0.5}[kind.promise]
    assert_close(actual, expected, tolerance)
    assert not any(parameter.requires_grad for parameter in program.parameters() if name == "frozen"), (
        "a frozen model stays frozen"
    )
    assert all(module.training is program.training for module in program.modules())
    assert not rewrite(kind(), program).changes, "a second run changes nothing"


@every_pass
@pytest.mark.parametrize("name", MODELS)
def test_what_it_makes_copies_and_pickles(kind: type[Pass], name: str) -> None:
    factory, shape = MODELS[name]
    program = captured(factory(), (torch.randn(*shape),))
    rewrite(kind(), program)
    program.eval()
    x = torch.randn(*shape)
    for duplicate in (copy.deepcopy(program), pickle.loads(pickle.dumps(program))):
        assert_close(duplicate(x), program(x), 0)
        duplicate.load_state_dict(program.state_dict())
        memory = [{t.data_ptr() for t in module.state_dict().values()} for module in (duplicate, program)]
        assert not memory[0] & memory[1]


@every_pass
def test_the_original_is_independent(kind: type[Pass]) -> None:
    case = STATIC["staged_cnn"]
    model, inputs = case.build(), case.example()
    program = captured(model, inputs)
    rewrite(kind(), program)
    expected = model(*inputs)
    with torch.no_grad():
        for parameter in program.parameters():
            parameter.zero_()
    assert_close(model(*inputs), expected, 0)


@every_pass
def test_pickles_and_equals(kind: type[Pass]) -> None:
    assert pickle.loads(pickle.dumps(kind())) == kind()
    assert hash(kind()) == hash(kind())


@every_pass
def test_round_trips_as_text(kind: type[Pass]) -> None:
    assert spec.parse(kind.name) == (kind(),)
    assert spec.parse(spec.render([kind()])) == (kind(),)


@pytest.mark.parametrize(
    "text",
    [
        "clean{max_bytes=16},fuse{include=layer1.*,activations=false},qat{bits=4}",
        "qat{weights=int4,activations=int8,observer=ema,exclude=head}",
    ],
)
def test_options_round_trip(text: str) -> None:
    assert spec.parse(spec.render(spec.parse(text))) == spec.parse(text)
