"""A captured module is used as any nn.Module is."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

import fxopt
from fxopt.capture import capture
from fxopt.graph import GraphModule
from tests.capture.agree import assert_agree, assert_same
from tests.capture.odd import ODD
from tests.models import DYNAMIC, STATIC, Case

NAMES = ["staged_cnn", "encoder", "tied_head", "heads", "router", "mixture", "learnable_dropout"]


@pytest.fixture(params=NAMES)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, GraphModule, Case]:
    case = {**STATIC, **DYNAMIC}[request.param]
    module = case.build()
    return module, capture(module, case.example(), case.kwargs).module, case


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
def test_copies_do_the_same_and_share_nothing(pair, duplicate):
    module, captured, case = pair
    other = duplicate(captured)
    assert_agree(module, other, case)
    assert list(other.graphs) == list(captured.graphs)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_same(module(*case.example(), **case.kwargs), captured(*case.example(), **case.kwargs))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved])
@pytest.mark.parametrize("name", ["own_backward", "attributes", "made_by_classes", "counter_inside"])
def test_copies_of_odd_modules_do_the_same(name, duplicate):
    case = ODD[name]
    module = case.build()
    assert_agree(module, duplicate(capture(module, case.example(), case.kwargs).module), case)


def test_copies_know_where_their_nodes_come_from():
    case = STATIC["staged_cnn"]
    captured = capture(case.build(), case.example()).module
    for duplicate in (copy.deepcopy(captured), pickle.loads(pickle.dumps(captured))):
        assert [node.meta["source"] for node in duplicate.graph.nodes if node.op == "call_module"] == [
            node.meta["source"] for node in captured.graph.nodes if node.op == "call_module"
        ]


def test_state_goes_both_ways(pair):
    module, captured, case = pair
    other = case.build(seed=7)
    captured.load_state_dict(other.state_dict())
    assert_same(other(*case.example(), **case.kwargs), captured(*case.example(), **case.kwargs))
    module.load_state_dict(captured.state_dict())
    assert_same(other(*case.example(), **case.kwargs), module(*case.example(), **case.kwargs))
    captured.load_state_dict(case.build(seed=8).state_dict(), assign=True)
    assert_same(case.build(seed=8)(*case.example(), **case.kwargs), captured(*case.example(), **case.kwargs))


def test_dtypes(pair):
    module, captured, case = pair
    for change in (lambda m: m.double(), lambda m: m.to(torch.bfloat16)):
        one, other = change(copy.deepcopy(module)), change(copy.deepcopy(captured))
        dtype = next(one.parameters()).dtype
        args = tuple(arg.to(dtype) if arg.is_floating_point() else arg for arg in case.example())
        assert_same(one(*args, **case.kwargs), other(*args, **case.kwargs))
    assert_same(dict(copy.deepcopy(module).half().state_dict()), dict(copy.deepcopy(captured).half().state_dict()))


def test_devices(pair):
    _, captured, _ = pair
    moved = copy.deepcopy(captured).to("meta")
    assert {tensor.device.type for tensor in (*moved.parameters(), *moved.buffers())} == {"meta"}


def test_freezing(pair):
    _, captured, case = pair
    captured.requires_grad_(False)
    assert not any(parameter.requires_grad for parameter in captured.parameters())
    output = captured(*case.example(), **case.kwargs)
    leaves = torch.utils._pytree.tree_leaves(output)
    assert not any(leaf.requires_grad for leaf in leaves if isinstance(leaf, torch.Tensor))


def test_hooks(pair):
    module, captured, case = pair
    called = []
    captured.register_forward_pre_hook(lambda module, args: called.append("before"))
    captured.register_forward_hook(lambda module, args, output: called.append("after"))
    assert_same(module(*case.example(), **case.kwargs), captured(*case.example(), **case.kwargs))
    assert called == ["before", "after"]


@pytest.mark.parametrize(
    "duplicate", [lambda module: module, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
@pytest.mark.parametrize("register", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_a_hook_that_no_graph_runs_is_warned_of(duplicate, register):
    module = nn.Sequential(nn.Sequential(nn.Linear(3, 3)))
    captured = duplicate(capture(module, (torch.randn(2, 3),)).module)
    for name in ("", "0.0"):
        getattr(captured.get_submodule(name), f"register_{register}")(lambda *given: None)
    with pytest.warns(UserWarning, match="a hook on '0' does not run where the captured module is called") as warned:
        getattr(captured.get_submodule("0"), f"register_{register}")(lambda *given: None)
    assert warned[0].filename == __file__


def test_capture_itself_hooks_what_a_graph_runs_through_without_a_warning():
    x = torch.randn(2, 3)
    module = capture(nn.Sequential(nn.Sequential(nn.Linear(3, 3))), (x,)).module
    module.register_forward_hook(lambda *given: None)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        again = capture(module, (x,)).module
    assert told == []
    assert_same(module(x), again(x))


def test_copies_of_hooks_that_were_there_before_are_not_warned_of():
    module = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    module[0].register_forward_hook(lambda module, args, output: output * 2)
    x = torch.randn(2, 3)
    optimized = fxopt.optimize(module, x, "clean,fuse", devices=()).module
    assert_same(module(x), copy.deepcopy(optimized)(x))


def test_a_part_that_no_graph_runs_as_a_whole_is_warned_of():
    module = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), nn.Linear(3, 3))
    captured = capture(module, (torch.randn(2, 3),)).module
    for name, part in (("0", nn.Sequential(nn.Linear(3, 4), nn.Tanh())), ("1", nn.Sequential(nn.Linear(4, 5)))):
        setattr(captured, name, part)
    assert captured(torch.randn(2, 3)).shape == (2, 5)
    with pytest.warns(UserWarning, match=r"what is now '0' does not run as a whole: the graph calls '0\.0'") as warned:
        setattr(captured, "0", nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 9)))
    assert warned[0].filename == __file__


def test_hooks_on_leaves_run_and_change_outputs():
    case = STATIC["staged_cnn"]
    module = case.build()
    captured = capture(module, case.example()).module
    for each in (module, captured):
        each.get_submodule("stem.conv").register_forward_hook(lambda module, args, output: output * 2)
        each.get_submodule("head.2").register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 3,))
    assert_agree(module, captured, case)


@pytest.mark.parametrize("name", ["residual_mlp", "staged_cnn", "heads", "learnable_dropout"])
def test_torch_compile(name):
    case = {**STATIC, **DYNAMIC}[name]
    module = case.build()
    captured = capture(module, case.example(), case.kwargs).module
    torch._dynamo.reset()
    compiled = torch.compile(captured, backend="eager", fullgraph=True)
    for times in (1, 2):
        args = tuple(torch.cat([arg] * times) for arg in case.example())
        assert_same(module(*args, **case.kwargs), compiled(*args, **case.kwargs))


@pytest.mark.parametrize("name", ["router", "mixture"])
def test_torch_compile_of_a_shell(name):
    case = DYNAMIC[name]
    module = case.build()
    captured = capture(module, case.example(), case.kwargs).module
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_same(module(*case.example()), torch.compile(captured, backend="eager")(*case.example()))


@pytest.mark.parametrize("name", STATIC)
def test_torch_export(name):
    case = STATIC[name]
    module = case.build()
    captured = capture(module, case.example(), case.kwargs).module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(captured, case.example(), dict(case.kwargs)).module()
        actual = exported(*case.example(), **case.kwargs)
    expected = module(*case.example(), **case.kwargs)
    # torch.export gives a dict of a type of its own
    assert_same(dict(expected) if name == "heads" else expected, dict(actual) if name == "heads" else actual)


@pytest.mark.parametrize("name", [name for name in STATIC if name not in ("heads", "one_head")])
def test_torch_jit_trace(name):
    case = STATIC[name]
    module = case.build()
    captured = capture(module, case.example()).module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(captured, case.example(), check_trace=False)
    assert_same(module(*case.example()), traced(*case.example()))
