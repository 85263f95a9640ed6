"""clean: what it removes, what it leaves because something could see it, and that the outputs are equal to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.errors import SpecError
from fxopt.graph import GraphModule
from passes import Clean
from tests.models import DYNAMIC, STATIC
from tests.passes.programs import assert_close, captured, rewrite, run


class Function(nn.Module):
    """A model that is one function of its input."""

    def __init__(self, function: Callable[[torch.Tensor], object]):
        super().__init__()
        self.function = function
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x):
        return self.function(x)


def dead(x: torch.Tensor) -> torch.Tensor:
    torch.exp(x)
    return x.cos()


def read_twice(x: torch.Tensor) -> torch.Tensor:
    return torch.sin(x) * 2 + torch.sin(x)


def sizes(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(x.size(0), -1).sum(-1) / x.size(0)


def positions(x: torch.Tensor) -> torch.Tensor:
    return x + torch.arange(4).unsqueeze(0).float() / 10


REWRITES: dict[str, tuple[Callable[[torch.Tensor], object], list[str]]] = {
    "dead code": (dead, ["cos"]),
    "dropout": (lambda x: F.dropout(x, 0.5, False).cos(), ["cos"]),
    "cast": (lambda x: (x + 1).float().to(torch.float32).cos(), ["add", "cos"]),
    "type": (lambda x: (x + 1).type(torch.float32).cos(), ["add", "cos"]),
    "contiguous twice": (lambda x: x.t().contiguous().contiguous(), ["t", "contiguous"]),
    "views": (lambda x: x.view(2, 6).view(-1).cos(), ["view", "cos"]),
    "reshapes": (lambda x: x.t().reshape(2, 6).reshape(-1).cos(), ["t", "reshape", "cos"]),
    "flatten, view": (lambda x: torch.flatten(x).view(2, 6).cos(), ["reshape", "cos"]),
    "unsqueeze, view": (lambda x: x.unsqueeze(0).view(2, 6).cos(), ["reshape", "cos"]),
    "transposes": (lambda x: x.transpose(0, 1).transpose(-1, -2).cos(), ["cos"]),
    "transposes by another name": (lambda x: x.swapaxes(0, 1).transpose(0, 1).cos(), ["cos"]),
    "t": (lambda x: x.t().t().cos(), ["cos"]),
    "permutes": (
        lambda x: x.unsqueeze(0).permute(1, 2, 0).permute(1, 2, 0).cos(),
        ["unsqueeze", "permute", "cos"],
    ),
    "permutes back": (lambda x: torch.permute(x.permute(1, 0), (1, 0)).cos(), ["cos"]),
    "constant": (positions, ["add"]),
    "twice": (read_twice, ["sin", "mul", "add"]),
}


@pytest.mark.parametrize("name", REWRITES)
def test_rewrites(name: str) -> None:
    function, expected = REWRITES[name]
    model = Function(function).eval()
    x = torch.randn(3, 4)
    outcome = run(Clean(), model, (x,))
    assert outcome.calls == expected
    assert outcome.changes
    assert_close(outcome.module(x), model(x), 0)
    assert not rewrite(Clean(), outcome.module).changes


def written_view(x: torch.Tensor) -> torch.Tensor:
    y = x + 0
    y.t().t().mul_(2)
    return y


def written_constant(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(3, 4)
    out[0] = 1
    return x + out


def written_between(x: torch.Tensor) -> torch.Tensor:
    y = x + 0
    before = torch.sin(y)
    y.mul_(2)
    return before + torch.sin(y)


def written_reshape(x: torch.Tensor) -> torch.Tensor:
    y = x + 0
    z = y.t().reshape(2, 6).reshape(4, 3)
    z.mul_(2)
    return y + z.t()


def random_twice(x: torch.Tensor) -> torch.Tensor:
    return x + torch.rand_like(x) - torch.rand_like(x)


def once_without_gradients(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        scale = x.abs().amax()
    return x.abs() / scale


KEEPS: dict[str, Callable[[torch.Tensor], object]] = {
    "another dtype": lambda x: x.double().float(),
    "a cast of an input, which may come in another dtype": lambda x: x.float().cos(),
    "a written constant": written_constant,
    "a returned constant": lambda x: (x.cos(), torch.ones(3)),
    "written in between": written_between,
    "written through a reshape": written_reshape,
    "random": random_twice,
    "with and without gradients": once_without_gradients,
    "other transposes": lambda x: x.unsqueeze(0).transpose(0, 1).transpose(1, 2),
    "a view as another dtype": lambda x: x.view(torch.int32).view(12),
    "contiguous of a view": lambda x: x.t().contiguous().view(-1),
    "in place": lambda x: (x + 0).relu_(),
    "two arguments that are only equal": lambda x: torch.full((1,), 1) + torch.full((1,), 1.0) + x,
}


@pytest.mark.parametrize("name", KEEPS)
def test_keeps(name: str) -> None:
    model = Function(KEEPS[name]).eval()
    x = torch.randn(3, 4)
    program = captured(model, (x,))
    before = [node.target for node in program.graph.nodes if node.op.startswith("call_")]
    outcome = rewrite(Clean(max_bytes=0 if "equal" in name else 1024), program)
    assert [node.target for node in program.graph.nodes if node.op.startswith("call_")] == before, outcome.whats
    torch.manual_seed(0)
    actual = outcome.module(x.clone())
    torch.manual_seed(0)
    assert_close(actual, model(x.clone()), 0)


def test_a_write_through_removed_views_is_kept() -> None:
    model = Function(written_view).eval()
    x = torch.randn(3, 4)
    outcome = run(Clean(), model, (x,))
    assert "mul_" in outcome.calls
    assert_close(outcome.module(x), model(x), 0)


def test_dropout_stays_in_training() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Identity(), nn.Linear(4, 4))
    assert run(Clean(), model.train(), (torch.randn(3, 4),)).calls == ["0", "2"]
    assert run(Clean(), model.eval(), (torch.randn(3, 4),)).calls == ["2"]


def test_functional_dropout_follows_the_mode() -> None:
    class Drops(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.5, self.training).cos()

    assert run(Clean(), Drops().eval(), (torch.randn(3, 4),)).calls == ["cos"]
    assert run(Clean(), Drops().train(), (torch.randn(3, 4),)).calls == ["dropout", "cos"]


def test_hooked_identity_stays() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 4)).eval()
    model[0].register_forward_hook(lambda module, args, output: output * 2)
    x = torch.randn(3, 4)
    outcome = run(Clean(), model, (x,))
    assert outcome.calls == ["0", "1"]
    assert_close(outcome.module(x), model(x), 0)


def test_constants_up_to_a_size() -> None:
    model = Function(positions).eval()
    x = torch.randn(3, 4)
    assert run(Clean(max_bytes=0), model, (x,)).calls == ["arange", "unsqueeze", "float", "truediv", "add"]
    # The integers are twice as large as what they become.
    assert run(Clean(max_bytes=31), model, (x,)).calls == ["arange", "unsqueeze", "float", "truediv", "add"]
    outcome = run(Clean(), model, (x,))
    assert list(outcome.module.state_dict()) == list(model.state_dict())
    with pytest.raises(SpecError, match="'max_bytes' is 0 or more"):
        Clean(max_bytes=-1)


def test_buffers_are_no_constants() -> None:
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(4))

        def forward(self, x):
            return x * (self.scale + 1)

    outcome = run(Clean(), Scaled(), (torch.randn(3, 4),))
    assert outcome.calls == ["add", "mul"]


def test_guards_stay() -> None:
    def guarded(x: torch.Tensor) -> torch.Tensor:
        return x.cos() if x.shape[1] == 4 else x.sin()

    program = captured(Function(guarded).eval(), (torch.randn(3, 4),))
    guards = [node.name for node in program.graph.nodes if node.name.startswith("guard")]
    rewrite(Clean(), program)
    assert [node.name for node in program.graph.nodes if node.name.startswith("guard")] == guards


def test_an_unknown_call_is_not_dead() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(see, (x,))
    graph.output(x)
    program = GraphModule(nn.Module(), {False: graph})
    rewrite(Clean(), program)
    program(torch.ones(1))
    assert len(seen) == 1


seen: list[torch.Tensor] = []


def see(x: torch.Tensor) -> None:
    seen.append(x)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [*STATIC, *DYNAMIC])
def test_models(name: str, training: bool) -> None:
    case = {**STATIC, **DYNAMIC}[name]
    model, inputs = case.build().train(training), case.example()
    program = captured(model, inputs, case.kwargs)
    reference = copy.deepcopy(program)
    outcome = rewrite(Clean(), program)
    assert not rewrite(Clean(), program).changes
    torch.manual_seed(0)
    actual = outcome.module(*inputs, **case.kwargs)
    torch.manual_seed(0)
    assert_close(actual, reference(*inputs, **case.kwargs), 0)
