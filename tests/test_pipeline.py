"""The pipeline: promises are held, the change that breaks one is named, and what died is removed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.capture import capture
from fxopt.contract import Change, Pass, Promise, Rewrite, Skip
from fxopt.errors import PassError, SpecError, VerifyError
from fxopt.graph import Region
from fxopt.pipeline import check_order, replay, run_passes
from fxopt.verify import Oracle
from passes import Clean, Fuse
from tests import models

INPUTS = fxopt.Inputs((torch.linspace(-1, 1, 8).reshape(2, 4),))


def chain() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).eval()


def run(module: nn.Module, *passes: Pass, inputs: fxopt.Inputs = INPUTS) -> tuple[fxopt.Captured, tuple[Change, ...]]:
    captured = capture(module, inputs.args, inputs.kwargs)
    ledger = run_passes(captured, passes, Oracle(module, inputs))
    return captured, ledger.changes


@dataclass(frozen=True)
class Scale(Rewrite[fx.Node]):
    """Multiplies the result of each module whose name ends in `ending` by `factor`."""

    name: ClassVar[str] = "scale"
    promise: ClassVar[Promise] = Promise.CLOSE
    ending: str = ""
    factor: float = 1.5

    def match(self, node: fx.Node, region: Region) -> fx.Node | Skip | None:
        return node if node.op == "call_module" else None

    def rewrite(self, node: fx.Node, region: Region) -> Change:
        if str(node.target).endswith(self.ending):
            with region.graph.inserting_after(node):
                scaled = region.graph.call_function(operator.mul, (node, self.factor))
            node.replace_all_uses_with(scaled, delete_user_cb=lambda user: user is not scaled)
        return Change("looked at", str(node.target), "model.py:7")


@dataclass(frozen=True)
class Behind(Scale):
    """Puts `function` behind each such module."""

    name: ClassVar[str] = "behind"
    function: object = None

    def rewrite(self, node: fx.Node, region: Region) -> Change:
        with region.graph.inserting_after(node):
            made = region.graph.call_function(self.function, (node,))  # type: ignore[arg-type]
        node.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        return Change("looked at", str(node.target))


@dataclass(frozen=True)
class ScaleExactly(Scale):
    name: ClassVar[str] = "scale-exactly"
    promise: ClassVar[Promise] = Promise.EXACT


@dataclass(frozen=True)
class ScaleFreely(Scale):
    name: ClassVar[str] = "scale-freely"
    promise: ClassVar[Promise] = Promise.CHANGES


@dataclass(frozen=True)
class Replace(Pass):
    """Replaces the output by what `function` makes of it."""

    name: ClassVar[str] = "replace"
    promise: ClassVar[Promise] = Promise.CHANGES
    function: object = None

    def run(self, region: Region) -> Iterator[Change | Skip]:
        output = next(node for node in region.graph.nodes if node.op == "output")
        value = output.args[0]
        with region.graph.inserting_before(output):
            output.args = (region.graph.call_function(self.function, (value,)),)  # type: ignore[arg-type]
        yield Change("replaced", "output")


@dataclass(frozen=True)
class Detach(Replace):
    """Keeps all values and loses all gradients."""

    name: ClassVar[str] = "detach"
    promise: ClassVar[Promise] = Promise.EXACT


@dataclass(frozen=True)
class Late(Pass):
    """Leaves a graph that runs only where it may finish."""

    name: ClassVar[str] = "late"
    promise: ClassVar[Promise] = Promise.EXACT

    def run(self, region: Region) -> Iterator[Change | Skip]:
        (last,) = (node for node in region.graph.nodes if node.op == "output")
        names = {node: node.target for node in region.graph.nodes if node.op == "call_module"}
        for node in names:
            node.target = "none"
            yield Change("renamed", node.name)
        for node, name in names.items():
            node.target = name
        with region.graph.inserting_before(last):
            last.args = (region.graph.call_function(operator.mul, (last.args[0], 2.0)),)


def narrow(value: torch.Tensor) -> torch.Tensor:
    return value[..., :-1]


def halve(value: torch.Tensor) -> torch.Tensor:
    return value.half()


def wrap(value: torch.Tensor) -> list[torch.Tensor]:
    return [value]


def fail(value: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such kernel")


def skew_gradient(value: torch.Tensor) -> torch.Tensor:
    return value + (value - value.detach())


def test_a_broken_promise_names_the_change_that_broke_it_and_its_line() -> None:
    with pytest.raises(VerifyError) as caught:
        run(chain(), Scale(ending="2"))
    message = str(caught.value)
    assert message.startswith("scale: the output differs from the original by ")
    assert "(allowed 1e-04) after: looked at '2' (model.py:7); nothing was saved" in message
    assert caught.value.exit_code == 1


def test_a_broken_promise_of_a_pass_that_cannot_be_cut_short_names_no_change() -> None:
    with pytest.raises(VerifyError, match=r"^late: .* \(promised exactly equal\); nothing was saved"):
        run(chain(), Late())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (narrow, "the output has shape (2, 3), not (2, 4)"),
        (halve, "the output is torch.float16 in place of torch.float32"),
        (wrap, "the output is "),
        (fail, "it raises RuntimeError: no such kernel"),
    ],
)
def test_even_a_pass_that_may_change_values_keeps_structure_shape_and_dtype(function: object, message: str) -> None:
    with pytest.raises(VerifyError) as caught:
        run(chain(), Replace(function=function))
    assert message in str(caught.value)


class Keeps(nn.Module):
    """Gives what `keep` makes of a layer's values."""

    def __init__(self, keep: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4, bias=False))
        nn.init.eye_(self.layers[0].weight)
        self.keep = keep

    def forward(self, x: torch.Tensor) -> object:
        return self.keep(self.layers(x))


def keep_by_a_loop(value: torch.Tensor) -> torch.Tensor:
    return torch.stack([row for row in value if row.sum() > 3] + [value[0]])


@pytest.mark.parametrize(
    "keep",
    [
        lambda value: value[value > 0.5],
        lambda value: (value > 0.5).nonzero(),
        lambda value: {"count": len(value[value > 0.5]), "kept": value},
        keep_by_a_loop,
    ],
    ids=["a mask", "indices", "a count", "code that no graph holds"],
)
def test_a_pass_that_may_change_values_may_change_the_sizes_that_values_decide(
    keep: Callable[[torch.Tensor], object],
) -> None:
    run(Keeps(keep).eval(), ScaleFreely(ending="0", factor=2.0))
    with pytest.raises(VerifyError):
        run(Keeps(keep).eval(), Scale(ending="0", factor=2.0))


def double_and_halve(value: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return 2 * value[0], value[1].half()


def test_a_pass_that_may_change_values_keeps_the_dtype_of_each_output() -> None:
    with pytest.raises(VerifyError, match=r"output 1 is torch\.float16 in place of torch\.float32"):
        run(Keeps(lambda value: (value, value)).eval(), Replace(function=double_and_halve))


def test_rounding_keeps_the_promise_close_and_breaks_the_promise_exact() -> None:
    module, factor = chain(), 1 + 2**-20
    _, changes = run(module, Scale(ending="4", factor=factor))
    assert len(changes) == 5
    with pytest.raises(VerifyError, match="promised exactly equal"):
        run(module, ScaleExactly(ending="4", factor=factor))


class Amplifies(nn.Module):
    """Its outputs move by a million times what the outputs of its layer move by."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(1e6 * self.layer(x))


@pytest.mark.parametrize(("by", "holds"), [(3.0, True), (3.0 + 1e-6, False)])
@pytest.mark.parametrize("training", [False, True])
def test_what_float64_shows_to_be_rounding_keeps_the_promise_close(by: float, holds: bool, training: bool) -> None:
    def divided(value: torch.Tensor) -> torch.Tensor:
        return value * 3.0 / by

    torch.manual_seed(0)
    module, each = Amplifies().train(training), Behind(ending="layer", function=divided)
    if holds:
        assert run(module, each)[1]
    else:
        with pytest.raises(VerifyError, match="after: looked at 'layer'"):
            run(module, each)


def test_an_exact_pass_is_judged_against_the_pass_before_it() -> None:
    captured = capture(chain(), INPUTS.args)
    ledger = run_passes(captured, [ScaleFreely(ending="4"), Clean()], Oracle(chain(), INPUTS))
    assert [entry.relative_error for entry in ledger] == [pytest.approx(0.5, rel=1e-4)] * 2


def test_gradients_are_verified_where_the_module_trains() -> None:
    module = chain()
    run(module, Detach(function=skew_gradient))
    with pytest.raises(VerifyError, match=r"the gradient of '0\.weight'"):
        run(module.train(), Detach(function=skew_gradient))


def test_an_exception_inside_a_pass_is_a_bug_of_the_pass_and_says_so() -> None:
    with pytest.raises(PassError, match="replace: failed with AssertionError"):
        run(chain(), Replace(function=3))


def test_modules_and_parameters_that_lost_their_last_use_are_removed() -> None:
    case = models.STATIC["conv_block"]
    module = case.build()
    captured = capture(module, case.example(), dict(case.kwargs))
    assert any("running_mean" in name for name in captured.module.state_dict())
    run_passes(captured, [Fuse()], Oracle(module, fxopt.Inputs(case.example(), case.kwargs)))
    assert not any("running_mean" in name for name in captured.module.state_dict())
    assert any("running_mean" in name for name in module.state_dict())


def test_a_module_whose_state_went_still_prints() -> None:
    class NormByHand(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False).exp()

    module = nn.Sequential(nn.Conv2d(3, 4, 1), NormByHand(4)).eval()
    captured, _ = run(module, Fuse(), inputs=fxopt.Inputs.of(torch.randn(2, 3, 4, 4)))
    assert "NormByHand(" in repr(captured.module)
    assert list(captured.module.state_dict()) == ["0.weight", "0.bias", "1.num_batches_tracked"]


def test_what_no_graph_ever_called_stays() -> None:
    module = chain()
    module.unused = nn.Linear(2, 2)  # type: ignore[assignment]
    module.forward = lambda x: nn.Sequential.forward(module[:5], x)  # type: ignore[method-assign,index]
    captured, _ = run(module, Clean())
    assert "unused.weight" in captured.module.state_dict()


@dataclass(frozen=True)
class First(Scale):
    name: ClassVar[str] = "first"


@dataclass(frozen=True)
class Second(Scale):
    name: ClassVar[str] = "second"
    after: ClassVar[tuple[str, ...]] = ("first",)


@dataclass(frozen=True)
class Third(Scale):
    name: ClassVar[str] = "third"
    after: ClassVar[tuple[str, ...]] = ("second",)


@dataclass(frozen=True)
class Rival(Scale):
    name: ClassVar[str] = "rival"
    conflicts: ClassVar[tuple[str, ...]] = ("first",)


def test_the_order_that_passes_declare_is_held() -> None:
    check_order([First(), Second()])
    check_order([Second()])
    with pytest.raises(SpecError, match="'second' must come after 'first': write first,second"):
        check_order([Second(), First()])
    with pytest.raises(SpecError, match="'third' must come after 'second': write first,second,third"):
        check_order([Third(), Second(), First()])
    with pytest.raises(SpecError, match="'rival' and 'first' can't be in one pipeline"):
        check_order([First(), Rival()])


def test_a_replay_gives_the_verified_module_to_the_bit() -> None:
    case = models.STATIC["residual_block"]
    module, inputs = case.build(), fxopt.Inputs(case.example(), case.kwargs)
    captured = capture(module, inputs.args, inputs.kwargs)
    run_passes(captured, [Clean(), Fuse()], Oracle(module, inputs))
    again = replay(module, inputs, [Clean(), Fuse()])
    with torch.no_grad():
        assert torch.equal(again(*inputs.args), captured.module(*inputs.args))


def test_nodes_keep_shapes_after_each_pass() -> None:
    case = models.STATIC["residual_block"]
    module, inputs = case.build(), fxopt.Inputs(case.example(), case.kwargs)
    captured = capture(module, inputs.args, inputs.kwargs)
    run_passes(captured, [Clean(), Fuse()])
    calls = [node for node in captured.module.graph.nodes if node.op == "call_module"]
    assert calls
    assert all("tensor_meta" in node.meta for node in calls)
