"""Capture's promises on the models of `tests/models.py` and on modules that do what few do."""

from __future__ import annotations

import copy
import math
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.capture import capture
from fxopt.capture.independent import independent_copy
from fxopt.errors import CaptureError, GuardError
from fxopt.graph import GraphModule, observe
from tests.capture import odd
from tests.capture.agree import assert_agree, assert_same, assert_side_by_side
from tests.capture.odd import ODD
from tests.models import DYNAMIC, STATIC, Case, EarlyExit

MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
FULLY_IN_GRAPH = [*STATIC, "learnable_dropout"]
WHOLE = {
    "backward_hooked": {"block": "it has a hook on its gradients"},
    "counter": {"": "each call changes its attribute 'calls'"},
    "hidden_state": {"": "each call changes its attribute 'state'"},
    "history": {"": "each call changes its attribute 'seen'"},
    "initialized_by_data": {"": "its second call does something else, by its attribute 'ready'"},
    "made_unseen": {"": "it uses a tensor that was made where torch does not let calls be recorded"},
    "reads_hook_of_copy": {"": "it uses a tensor that was computed before or outside of what torch lets be recorded"},
    "from_array": {"": "it reads the values of a tensor ('numpy'), which depend on the input"},
    "vmapped_in_chunks": {"": "it runs under a vmap in chunks"},
    "tensor_hooked": {"": "it hangs a hook on a gradient"},
    "attributes": {"": "it decides on a number that depends on the values of the input"},
    "shared_expert": {"": "it decides on a number that depends on the values of the input"},
    "opaque_inside": {"route": "it decides on a number that depends on the values of the input"},
    "mode_inside_opaque": {"": "it decides on a number that depends on the values of the input"},
    "python_dropout": {"": "it draws from Python's or numpy's random numbers"},
    "warms_up": {"1": "it decides on '1.steps', which the forward writes ((add < 3) is True)"},
    "decides_on_gradient": {"": "it decides on the value of a tensor"},
    "counter_inside": {"1": "each call changes its attribute 'calls'"},
    "replaces_inside": {"1": "its forward registers 'scale'"},
    "python_dropout_inside": {"1": "it draws from Python's or numpy's random numbers"},
    "set_by_others": {"": "each call changes its attribute 'calls'"},
}
"""What can't be captured, by path, and why."""
ONE_MODE = {
    "opaque_in_training": "it decides on a number",
    "layer_drop": "it draws from Python's or numpy's random numbers",
}


def build(name: str, training: bool) -> tuple[nn.Module, Case]:
    case = {**STATIC, **DYNAMIC, **ODD}[name]
    return case.build().train(training), case


@MODES
@pytest.mark.parametrize("name", [name for name in (*STATIC, *DYNAMIC, *ODD) if name not in ONE_MODE])
def test_outputs_gradients_state_and_random_numbers_are_those_of_the_original(name, training):
    module, case = build(name, training)
    captured = capture(module, case.example(), case.kwargs)
    assert_agree(module, captured.module, case, modes=(training, not training))


@MODES
@pytest.mark.parametrize("name", FULLY_IN_GRAPH)
def test_static_models_are_wholly_in_graph(name, training):
    module, case = build(name, training)
    captured = capture(module, case.example(), case.kwargs)
    assert captured.opaque == ()
    assert captured.coverage.call_sites == captured.coverage.flops == captured.coverage.parameters == 1.0


@pytest.mark.parametrize("name", ODD)
def test_what_is_opaque_and_why(name):
    module, case = build(name, False)
    captured = capture(module, case.example(), case.kwargs)
    expected = WHOLE.get(name, {})
    assert [opaque.path for opaque in captured.opaque] == list(expected)
    for opaque in captured.opaque:
        assert opaque.reason.startswith(expected[opaque.path])


@MODES
@pytest.mark.parametrize("name", [*STATIC, *DYNAMIC, *ODD])
def test_the_original_its_mode_and_the_random_state_are_untouched(name, training):
    module, case = build(name, training)
    before = copy.deepcopy(dict(module.state_dict()))
    attributes = {path: dict(child.__dict__) for path, child in module.named_modules()}
    args = case.example()
    torch.manual_seed(5)
    random_state = torch.get_rng_state()
    capture(module, args, case.kwargs)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_same(before, dict(module.state_dict()))
    assert_same(args, case.example())
    for path, child in module.named_modules():
        assert child.__dict__.keys() == attributes[path].keys()
        assert child.training is attributes[path].get("training", child.training)


@pytest.mark.parametrize("name", [*STATIC, *DYNAMIC, *ODD])
def test_names_and_modules_stay(name):
    module, case = build(name, False)
    captured = capture(module, case.example(), case.kwargs).module
    assert list(captured.state_dict()) == list(module.state_dict())
    names = [name for name, _ in module.named_parameters()]
    assert [name for name, _ in captured.named_parameters()] == names
    assert [path for path, _ in captured.named_modules()] == [path for path, _ in module.named_modules()]
    original = {id(parameter) for parameter in module.parameters()}
    assert not original & {id(parameter) for parameter in captured.parameters()}


def test_training_one_never_shows_in_the_other():
    module, case = build("staged_cnn", True)
    before = copy.deepcopy(dict(module.state_dict()))
    captured = capture(module, case.example()).module
    optimizer = torch.optim.SGD(captured.parameters(), lr=0.1)
    captured(*case.example()).sum().backward()
    optimizer.step()
    assert_same(before, dict(module.state_dict()))
    assert not torch.equal(captured.state_dict()["stem.conv.weight"], before["stem.conv.weight"])


# Opaque shells


@MODES
@pytest.mark.parametrize("name", ["router", "mixture", "early_exit"])
def test_experts_are_graphs_also_those_that_the_example_did_not_choose(name, training):
    module, case = build(name, training)
    captured = capture(module, case.example(), case.kwargs)
    assert [(opaque.path, bool(opaque.location)) for opaque in captured.opaque] == [("", True)]
    experts = captured.module.layers if name == "early_exit" else captured.module.experts
    assert all(isinstance(expert, GraphModule) for expert in experts)
    assert captured.coverage.parameters == 1.0
    assert captured.coverage.flops == 1.0
    assert 0 < captured.coverage.call_sites < 1


@pytest.mark.parametrize("name", ["router", "mixture"])
def test_outputs_stay_exactly_equal_on_other_paths(name):
    module, case = build(name, False)
    captured = capture(module, case.example()).module
    for seed in range(40):
        args = case.example(seed)
        assert_same(module(*args), captured(*args))


def test_an_early_exit_exits_where_the_original_does():
    torch.manual_seed(0)
    module = EarlyExit().eval()
    captured = capture(module, (torch.randn(2, 8),)).module
    depths = set()
    for scale in (0.1, 1.0, 3.0, 10.0, 100.0):
        for _ in range(5):
            x = torch.randn(2, 8) * scale
            expected, actual = module(x), captured(x)
            assert_same(expected, actual)
            depths.add(expected[1])
    assert len(depths) > 3


def test_editing_an_expert_shows_in_the_shell():
    module, case = build("router", False)
    captured = capture(module, case.example()).module
    for expert in captured.experts:
        expert.get_submodule("2").weight = nn.Parameter(torch.zeros(16, 8))
        expert.get_submodule("2").bias = nn.Parameter(torch.full((16,), 3.0))
    assert torch.equal(captured(*case.example()), torch.full_like(module(*case.example()), 3.0))


@pytest.mark.parametrize("training", [True, False])
def test_a_part_that_copies_itself_into_another_mode_is_copied_in_its_own(training):
    class BuiltAnew(nn.Sequential):
        def __deepcopy__(self, memo):
            return BuiltAnew(*copy.deepcopy([*self], memo)).train(not training)

    module = nn.Sequential(BuiltAnew(nn.Dropout(), nn.Sequential(nn.Dropout())), nn.Dropout()).train(training)
    module[0][1].train(not training)
    copied = independent_copy(module)
    assert {name: part.training for name, part in copied.named_modules()} == {
        name: part.training for name, part in module.named_modules()
    }


def test_a_compiled_part_is_copied_with_its_weights():
    module = nn.Sequential(torch.compile(nn.Linear(3, 3), backend="eager"))
    duplicate = independent_copy(module)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.zero_()
    assert not duplicate(torch.ones(1, 3)).any()
    assert module(torch.ones(1, 3)).any()


def test_a_shared_module_below_opaque_code_stays_shared():
    module, case = build("shared_expert", False)
    captured = capture(module, case.example()).module
    assert isinstance(captured.experts[0], GraphModule)
    assert captured.experts[0] is captured.experts[2]
    assert len(list(captured.parameters())) == len(list(module.parameters()))


# Modes


def test_frozen_parts_keep_their_own_mode():
    module, case = build("partly_frozen", True)
    module.frozen_norm.eval()
    module.frozen_noise.eval()
    captured = capture(module, case.example()).module
    assert_side_by_side(copy.deepcopy(module), copy.deepcopy(captured), case)
    assert_agree(module, captured, case)


def test_a_frozen_batch_norm_keeps_its_own_mode():
    module, case = build("staged_cnn", True)
    module.stem.bn.eval()
    captured = capture(module, case.example()).module
    assert_side_by_side(copy.deepcopy(module), copy.deepcopy(captured), case)


def test_train_as_the_module_defines_it():
    module, case = build("frozen_norm", False)
    captured = capture(module, case.example()).module
    assert captured.train().bn.training is False
    assert captured.training is True
    assert captured.fc.training is True


def test_a_part_that_is_switched_alone_is_refused_where_one_graph_holds_for_the_whole():
    module, case = build("partly_frozen", True)
    captured = capture(module, case.example()).module
    captured.noise.eval()
    with pytest.raises(GuardError, match=r"'noise' in training mode .* is in evaluation mode here"):
        captured(*case.example())


@pytest.mark.parametrize("name", ONE_MODE)
def test_a_mode_whose_graph_would_not_hold_is_refused_where_it_was_not_captured(name):
    module, case = build(name, False)
    captured = capture(module, case.example())
    assert_agree(module, captured.module, case, modes=(False,))
    assert captured.opaque == ()
    assert f"captured for one mode only: in training mode {ONE_MODE[name]}" in captured.notes[0]
    with pytest.raises(GuardError, match=f"in training mode {ONE_MODE[name]}"):
        captured.module.train()(*case.example())
    assert_agree(module, capture(module.train(), case.example()).module, case)


def test_a_mode_that_raises_is_refused():
    module = odd.FailsInTraining().eval()
    captured = capture(module, (torch.randn(3, 4),))
    assert torch.equal(captured.module(torch.ones(3, 4)), module(torch.ones(3, 4)))
    with pytest.raises(GuardError, match="in training mode it raises NotImplementedError: inference only"):
        captured.module.train()(torch.randn(3, 4))


class SetsUp(nn.Module):
    """Sets itself up at its first call, and counts the steps of training where it is told to."""

    def __init__(self, counts):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.counts, self.is_set_up, self.steps = counts, False, 0

    def forward(self, x):
        self.is_set_up = True
        if self.training and self.counts:
            self.steps += 1
        return self.fc(x)


@pytest.mark.parametrize("counts", [False, True])
def test_what_is_set_once_keeps_no_mode_from_being_captured(counts):
    module = SetsUp(counts).eval()
    captured = capture(module, (torch.randn(3, 4),)).module.train()
    x = torch.randn(3, 4)
    if counts:
        with pytest.raises(GuardError, match="in training mode its forward changes its attribute"):
            captured(x)
    else:
        assert torch.equal(captured(x), module(x))


# Gradients


class Region(nn.Module):
    """Runs one of the functions below."""

    def __init__(self, function):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.function = function

    def forward(self, x):
        return self.function(self.fc, x)


def nested(fc, x):
    with torch.no_grad():
        y = fc(x)
        with torch.enable_grad():
            z = fc(y)
        return y, z, fc(z)


def switched(fc, x):
    with torch.set_grad_enabled(False):
        y = fc(x)
    return y, fc(y)


def decorated(fc, x):
    return torch.set_grad_enabled(False)(fc.forward)(x), torch.enable_grad()(fc.forward)(x), fc(x)


def entered_twice(fc, x):
    region = torch.no_grad()
    with region:
        y = fc(x)
    with region:
        return y, fc(y)


def caught(fc, x):
    try:
        with torch.no_grad():
            raise KeyError
    except KeyError:
        return fc(x)


@torch.inference_mode()
def inferred(fc, x):
    with torch.inference_mode(False):
        y = fc(x)
    return y, fc(x)


@pytest.mark.parametrize("function", [nested, switched, decorated, entered_twice, caught, inferred])
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("again", [False, True])
def test_a_region_without_gradients_ends_in_the_mode_of_its_caller(function, recorded, again):
    module, x = Region(function), torch.randn(3, 4)
    with torch.set_grad_enabled(recorded):
        captured = capture(module, (x,))
        if again:
            captured = capture(captured.module, (x,))
    assert captured.opaque == ()
    for called in (True, False):
        with torch.set_grad_enabled(called):
            expected, actual = module(x), captured.module(x)
            assert torch.is_grad_enabled() is called
        assert_same(expected, actual)
        assert [t.requires_grad for t in actual] == [t.requires_grad for t in expected]


@pytest.mark.parametrize("again", [lambda module: module, copy.deepcopy], ids=["itself", "a copy"])
def test_an_error_in_a_region_without_gradients_leaves_the_mode_of_the_caller(again):
    module = again(capture(Region(nested), (torch.randn(3, 4),)).module)
    with pytest.raises(RuntimeError, match="shapes"):
        module(torch.randn(3, 5))
    assert torch.is_grad_enabled()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    x = torch.randn(3, 4)
    assert_same(module(x), compiled(x))


class InferenceOnly(nn.Module):
    """Writes into parts of what it splits, which torch forbids with gradients."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        queries, keys = self.layer(x).chunk(2, -1)
        queries.mul_(0.5)
        return queries @ keys.mT


@pytest.mark.parametrize("on_guard_failure", ["error", "recapture"])
def test_a_forward_that_runs_without_gradients_alone_is_captured_so(on_guard_failure):
    module, x = InferenceOnly().eval(), torch.randn(3, 4)
    captured = capture(module, x, on_guard_failure=on_guard_failure)
    assert not captured.opaque
    assert torch.is_grad_enabled()
    with torch.no_grad():
        assert torch.equal(captured.module(x), module(x))
    with pytest.raises(RuntimeError, match="modified inplace"):
        captured.module(x)
    with pytest.raises(RuntimeError, match="modified inplace"):
        capture(module.train(), x)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        capture(module.eval(), torch.randn(3, 5))


class DecidesOnValues(nn.Module):
    def forward(self, x, shift=torch.full((3,), 4.0), *, scale=torch.full((3,), 2.0)):  # noqa: B008
        return x + shift * scale if x.sum() > 0 else x - shift * scale


@pytest.mark.parametrize("given", [(torch.ones(3),), (torch.ones(3), torch.zeros(3))], ids=["default", "given"])
@pytest.mark.parametrize("again", [lambda module: module, copy.deepcopy], ids=["itself", "a copy"])
def test_a_module_that_no_graph_holds_keeps_defaults_that_are_tensors(given, again):
    module, x = DecidesOnValues(), -torch.ones(3)
    captured = capture(module, given)
    assert captured.opaque
    called = again(captured.module)
    assert_same(module(x), called(x))
    assert_same(module(x, x), called(x, x))
    assert_same(module(x, shift=x), called(x, shift=x))
    assert_same(module(x, scale=x), called(x, scale=x))


@pytest.mark.parametrize("call", [GraphModule.__call__, lambda module, x: observe(module, (x,), {}, lambda *_: None)])
def test_an_error_in_a_region_of_autocast_leaves_the_mode_of_the_caller(call):
    class Cast(nn.Linear):
        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.float16), torch.autocast("cpu", enabled=False, cache_enabled=False):
                return super().forward(x)

    module, x = capture(Cast(4, 4), (torch.randn(3, 4),)).module, torch.randn(3, 4)
    before = torch.get_autocast_dtype("cpu")
    with pytest.raises(RuntimeError, match="shapes"):
        call(module, torch.randn(3, 5))
    assert not torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") is before
    assert torch.is_autocast_cache_enabled()
    torch.autocast_increment_nesting()
    assert torch.autocast_decrement_nesting() == 0
    assert_same(module(x), torch.compile(module, backend="eager", fullgraph=True)(x))


def guarded(fc, x):
    with torch.no_grad():
        return fc(x) if x.shape[0] > 2 else x


def test_recapture_leaves_the_mode_of_its_caller():
    captured = capture(Region(guarded), (torch.randn(3, 4),), on_guard_failure="recapture").module
    captured(torch.randn(2, 4))
    assert torch.is_grad_enabled()
    assert captured.fc(torch.randn(2, 4)).requires_grad


class KeepsHidden(nn.Module):
    """Keeps its last state in a buffer, with the history of it."""

    def __init__(self, in_place):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.in_place = in_place
        self.register_buffer("hidden", torch.zeros(3, 4))

    def forward(self, x):
        hidden = torch.tanh(self.fc(x) + self.hidden)
        if self.in_place:
            self.hidden.copy_(hidden)
        else:
            self.hidden = hidden
        return hidden * 2


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("was_run", [False, True])
def test_buffers_have_no_history_of_the_recording(in_place, was_run):
    module, x = KeepsHidden(in_place), torch.randn(3, 4)
    if was_run:
        module(x)
    captured = capture(module, (x,))
    assert captured.opaque == ()
    assert not captured.module.hidden.requires_grad
    assert_same(module(x), copy.deepcopy(captured.module)(x))


# Attributes and constants


def test_what_is_written_into_a_plain_attribute_leaves_it_no_history():
    module, x = odd.KeyCache(), torch.randn(3, 4)
    captured = capture(module, (x,))
    assert captured.opaque == ()
    assert not module.keys.requires_grad
    again = copy.deepcopy(captured.module)  # which torch refuses where a tensor has a history
    assert_same(again(x), module(x))


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_what_the_hooks_of_a_layer_set_on_it_is_kept_and_not_noted():
    module = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 4)), nn.utils.weight_norm(nn.Linear(4, 4)))
    captured = capture(module, (torch.randn(3, 4),))
    assert captured.opaque == captured.notes == ()


def test_a_cache_is_no_state():
    module, case = build("shape_cache", False)
    captured = capture(module, case.example())
    assert captured.opaque == ()
    assert any("'positions'" in note for note in captured.notes)
    x = torch.randn(7, 4)
    assert torch.equal(captured.module(x), module(x))


def test_lazy_and_late_layers():
    lazy = odd.Lazy()
    captured = capture(lazy, (torch.randn(3, 4),))
    assert captured.opaque == ()
    assert captured.module.fc.weight.shape == (3, 4)
    assert isinstance(lazy.fc, nn.LazyLinear)
    late = odd.BuiltByForward()
    opaque = capture(late, (torch.randn(3, 4),)).opaque
    assert [(part.path, part.reason) for part in opaque] == [("", "its forward registers 'layer', which a graph can't")]
    assert late.layer is None


def test_unregistered_tensors_are_constants():
    module, case = build("holder", False)
    captured = capture(module, case.example())
    assert [(c.description, c.location.startswith("models.py:")) for c in captured.constants] == [("4 float32", True)]
    assert list(captured.module.state_dict()) == list(module.state_dict())


def test_what_hooks_keep_of_the_example_is_let_go():
    module, case = build("reads_hook_of_copy", False)
    captured = capture(module, case.example()).module
    assert captured.kept.keys() == module.kept.keys()
    assert all(kept.numel() == 0 for kept in captured.kept.values())


def test_hooks_are_told():
    module, case = build("hooked", False)
    assert "hooks of 'block' were recorded into the graph" in capture(module, case.example()).notes


# What a graph can't be held to


class Drifting(nn.Module):
    """Its graph is not what it does: a constant is read behind torch's back."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x):
        y = self.fc(x)
        hidden = y.detach().__array__() if False else None
        return y if hidden is None else hidden


def test_what_gives_other_outputs_as_a_graph_stays_opaque(monkeypatch):
    from fxopt.capture import tree

    module = Drifting().eval()
    answers = iter(["the output differs by up to 1"] + [None] * 100)
    monkeypatch.setattr(tree, "replay", lambda module, call, expected: next(answers))
    captured = capture(module, (torch.randn(3, 4),))
    assert [opaque.reason for opaque in captured.opaque] == ["as a graph the output differs by up to 1"]
    assert isinstance(captured.module.fc, GraphModule)


def test_a_failure_of_recording_is_no_failure_of_capture(monkeypatch):
    from fxopt.capture import settle

    original = settle.record

    def broken(module, *rest, **options):
        if isinstance(module, Drifting) and not options.get("opaque"):
            raise KeyError("unforeseen")
        return original(module, *rest, **options)

    monkeypatch.setattr(settle, "record", broken)
    module = Drifting().eval()
    captured = capture(module, (torch.randn(3, 4),))
    assert [opaque.reason for opaque in captured.opaque] == ["recording it failed (KeyError: 'unforeseen')"]
    x = torch.randn(5, 4)
    assert torch.equal(captured.module(x), module(x))
    assert isinstance(captured.module.fc, GraphModule)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("made", [torch.jit.script, lambda module: torch.jit.trace(module, torch.ones(1, 4))])
def test_torchscript_itself_is_refused(made):
    with pytest.raises(CaptureError, match="is TorchScript, whose operators can't be seen: give the module that was"):
        capture(made(nn.Linear(4, 4)), (torch.ones(1, 4),))


def test_a_generator_is_refused():
    with pytest.raises(CaptureError, match="input 0 of 'Linear' is a generator, which can be read only once"):
        capture(nn.Linear(2, 2), ((row for row in range(3)),))


@pytest.mark.parametrize("name", ["holder", "within_autocast", *WHOLE])
def test_a_captured_module_is_captured_again_as_it_is(name):
    module, case = build(name, False)
    captured = capture(module, case.example(), case.kwargs)
    again = capture(captured.module, case.example(), case.kwargs)
    assert [each.path for each in again.opaque] == [each.path for each in captured.opaque]
    assert called(again.module) == called(captured.module)
    assert_agree(module, again.module, case)


def called(module):
    graphs = [part.graph for part in module.modules() if isinstance(part, GraphModule)]
    return [node.target for graph in graphs for node in graph.nodes if node.op.startswith("call_")]


def test_what_a_forward_imports_is_loaded_as_always(tmp_path, monkeypatch):
    (tmp_path / "imported_first.py").write_text(
        "import math, torch\nfrom torch import nn\n"
        "functions = torch.Tensor.__new__, nn.Module.__call__, math.sqrt\n"
        "SCALE = nn.Linear(4, 4).weight.detach() * 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    class Imports(nn.Module):
        def forward(self, x):
            from imported_first import SCALE

            return x @ SCALE

    module, x = Imports(), torch.randn(3, 4)
    captured = capture(module, (x,))
    imported = sys.modules.pop("imported_first")
    assert captured.opaque == ()
    assert imported.functions == (torch.Tensor.__new__, nn.Module.__call__, math.sqrt)
    assert torch.equal(captured.module(x), x @ imported.SCALE)


def test_capturing_in_several_threads_at_once():
    before = nn.Module.__call__, len, "training" in vars(nn.Module)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(3) as threads:
            made = list(threads.map(lambda _: capture(ByLength().eval(), (torch.ones(2, 4),)), range(12)))
    finally:
        sys.setswitchinterval(interval)
    assert (nn.Module.__call__, len, "training" in vars(nn.Module)) == before
    assert [(captured.opaque, captured.guards) for captured in made] == [((), ())] * 12


class ByLength(nn.Module):
    """Reads the mode, and the length of its input often."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(20):
            x = F.dropout(self.fc(x), training=self.training) / len(x)
        return x
