"""merge: which layers become one, which stay and why, and that neither shows in outputs, gradients or saved state."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import fxopt
from passes import Fuse, Merge
from tests.passes.programs import Outcome, assert_close, captured, rewrite, run

Forward = Callable[[Any, torch.Tensor], Any]


def heads(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Attention, with the views that slices must not break."""
    q, k, v = (layer(x).view(x.shape[0], -1, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)


def gated(self: Any, x: torch.Tensor) -> torch.Tensor:
    return F.silu(self.q(x)) * self.k(x)


class Parallel(nn.Module):
    """Three layers, and a forward that uses them."""

    def __init__(self, forward: Forward, bias: tuple[bool, bool, bool] = (True, True, True), **options: Any):
        super().__init__()
        self.q = nn.Linear(8, 8, bias=bias[0], **options)
        self.k = nn.Linear(8, 8, bias=bias[1], **options)
        self.v = nn.Linear(8, 8, bias=bias[2], **options)
        self.run = forward

    def forward(self, x: torch.Tensor) -> Any:
        return self.run(self, x)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_q, self.w_k = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(4, 8))
        self.b_k = nn.Parameter(torch.randn(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return F.linear(x, self.w_q), F.linear(x, self.w_k, bias=self.b_k)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 6)
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.q(x), F.linear(input=x, weight=self.weight)


class TwoGraphs(Parallel):
    """Takes another path in training."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = heads(self, x)
        return y + torch.tanh(x) if self.training else y


class Repeated(nn.Module):
    """One block at several depths."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Parallel(heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.block(x))


class Stacked(nn.Module):
    """One block under several names."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*[Parallel(heads)] * 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.blocks(x)


MERGED = "q: merged with 'k', 'v'"
MERGES: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "q, k, v": (lambda: Parallel(heads), [MERGED]),
    "gate and up": (lambda: Parallel(gated), ["q: merged with 'k'"]),
    "no bias": (lambda: Parallel(heads, (False, False, False)), [MERGED]),
    "some bias": (lambda: Parallel(heads, (True, False, True)), [MERGED]),
    "functions": (Functional, ["linear: merged with 'linear_1'"]),
    "module and function": (Mixed, ["q: merged with 'linear'"]),
    "keyword": (lambda: Parallel(lambda self, x: (self.q(input=x), self.k(x))), ["q: merged with 'k'"]),
    "two graphs": (lambda: TwoGraphs(heads), [MERGED]),
    "called twice": (Repeated, ["block.q: merged with 'block.k', 'block.v'"]),
    "under two names": (Stacked, ["blocks.0.q: merged with 'blocks.0.k', 'blocks.0.v'"]),
    "returned as they are": (lambda: Parallel(lambda self, x: [self.q(x), self.k(x)]), ["q: merged with 'k'"]),
    "one value stays apart": (
        lambda: Parallel(lambda self, x: self.q(x) + self.k(x) * self.v(torch.cos(x))),
        ["q: merged with 'k'"],
    ),
}


def linear_layers(outcome: Outcome) -> int:
    nodes = outcome.module.graph.nodes
    modules = [outcome.module.get_submodule(str(n.target)) for n in nodes if n.op == "call_module"]
    return sum(isinstance(module, nn.Linear) for module in modules) + sum(n.target is F.linear for n in nodes)


# A bias that is not there must not learn: see test_no_bias_is_made_to_learn.
TRAINED = sorted(MERGES.keys() - {"some bias", "functions", "module and function"})


@pytest.mark.parametrize(("name", "training"), [(n, False) for n in MERGES] + [(n, True) for n in TRAINED])
def test_merges(name: str, training: bool) -> None:
    factory, expected = MERGES[name]
    torch.manual_seed(0)
    model, x = factory().train(training), torch.randn(3, 5, 8)
    state = copy.deepcopy(model.state_dict())
    outcome = run(Merge(), model, (x,))
    assert outcome.whats == expected
    for each in (x, torch.randn(1, 5, 8)):
        assert_close(outcome.module(each), model(each))
    assert_close(model.state_dict(), state, 0)
    for duplicate in (copy.deepcopy(outcome.module), pickle.loads(pickle.dumps(outcome.module))):
        assert_close(duplicate(x), model(x))


@pytest.mark.parametrize("name", MERGES)
def test_state_from_before_loads(name: str) -> None:
    factory, _ = MERGES[name]
    torch.manual_seed(0)
    model, other, x = factory().eval(), factory().eval(), torch.randn(3, 5, 8)
    merged = fxopt.optimize(model, x, [Merge()], devices=()).module
    keys = list(merged.state_dict())
    assert len(keys) < len(model.state_dict())
    merged.load_state_dict(other.state_dict())
    assert_close(merged(x), other(x))
    merged.load_state_dict(merged.state_dict())
    assert list(merged.state_dict()) == keys


def test_state_from_before_that_lacks_a_bias_is_refused_as_torch_refuses_it() -> None:
    factory, _ = MERGES["q, k, v"]
    model, x = factory().eval(), torch.randn(3, 5, 8)
    merged = fxopt.optimize(model, x, [Merge()], devices=()).module
    before = {key: value.clone() for key, value in merged.state_dict().items()}
    state = {key: value + 1 for key, value in model.state_dict().items() if key != "k.bias"}
    with pytest.raises(RuntimeError, match="Missing key"):
        merged.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in merged.state_dict().items())


def test_both_graphs_call_the_merged_layer() -> None:
    model, x = TwoGraphs(heads).eval(), torch.randn(3, 5, 8)
    outcome = run(Merge(), model, (x,))
    assert len(outcome.module.graphs) == 2
    for mode in (True, False):
        assert linear_layers(outcome) == 1
        assert_close(outcome.module.train(mode)(x), model.train(mode)(x))


@pytest.mark.parametrize("name", ["q, k, v", "gate and up", "no bias", "called twice", "returned as they are"])
def test_gradients_are_those_of_the_parts(name: str) -> None:
    torch.manual_seed(0)
    model, x = MERGES[name][0]().train(), torch.randn(3, 5, 8)
    module = run(Merge(), model, (x,)).module
    for each in (model, module):
        sum(value.square().sum() for value in torch.utils._pytree.tree_leaves(each(x))).backward()
    before = dict(model.named_parameters())
    for key, parameter in module.named_parameters():
        owner, _, kind = key.rpartition(".")
        prefix, _, leaf = owner.rpartition(".")
        parts = [before[f"{prefix}.{part}.{kind}".lstrip(".")] for part in leaf.split("_")]
        assert all((part.grad is None) is (parameter.grad is None) for part in parts), "what is unused stays unused"
        if parameter.grad is not None:
            assert_close(parameter.grad, torch.cat([part.grad for part in parts]))


def test_no_bias_is_made_to_learn() -> None:
    model, x = Parallel(heads, (True, False, True)).train(), torch.randn(3, 5, 8)
    outcome = run(Merge(), model, (x,))
    assert outcome.whats == ["q: merged with 'v'"]
    assert outcome.reasons == ["k: it and 'q', on the same input, differ in having a bias to train"]
    assert_close(outcome.module(x), model(x))
    frozen = Parallel(heads, (True, False, True)).train().requires_grad_(False)
    assert run(Merge(), frozen, (x,)).whats == [MERGED]


def changed(change: Callable[[Parallel], Any], forward: Forward = gated) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = Parallel(forward).eval()
        change(model)
        return model

    return build


def tie(model: Parallel) -> None:
    model.v.weight = model.k.weight


def in_place(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.q(x)
    y += self.k(x)
    return y


def input_written(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = torch.cos(x)
    a = self.q(y)
    y[0].mul_(2)
    return a + self.k(y)


def without_gradients(self: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        k = self.k(x)
    return self.q(x) + k


def asks_for_strides(self: Any, x: torch.Tensor) -> torch.Tensor:
    y = self.q(x)
    return y.as_strided((2, 8), (8, 1)) + self.k(x)[0, :2]


REFUSALS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "used elsewhere": (
        changed(lambda m: None, lambda self, x: self.q(x) + self.k(x) + self.k(torch.cos(x))),
        "differ in what else they are called on",
    ),
    "called twice on one input": (
        changed(lambda m: None, lambda self, x: self.q(x) * self.k(x) + self.k(x)),
        "k: it is called twice on one input",
    ),
    "tied": (changed(tie, lambda self, x: self.q(x) + self.k(x) + self.v(torch.cos(x))), "'v' reads them too"),
    "partly frozen": (changed(lambda m: m.k.requires_grad_(False)), "differ in what of them trains"),
    "hook": (changed(lambda m: m.k.register_forward_hook(lambda *_: None)), "k: it has a forward hook"),
    "parametrized": (changed(lambda m: parametrizations.weight_norm(m.k)), "k: its parameters are parametrized"),
    "output written": (
        changed(lambda m: None, in_place),
        "q: the output of 'q' can't be a slice: 'add_' writes into it",
    ),
    "input written": (changed(lambda m: None, input_written), "written in place by 'mul_' between them"),
    "other mode": (changed(lambda m: None, without_gradients), "gradients or autocast are switched on or off"),
    "strides": (changed(lambda m: None, asks_for_strides), "'as_strided' looks at its strides"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refuses_with_the_reason(name: str) -> None:
    factory, reason = REFUSALS[name]
    torch.manual_seed(0)
    model, x = factory(), torch.randn(3, 5, 8)
    outcome = run(Merge(), model, (x,))
    assert not outcome.changes
    assert any(reason in said for said in outcome.reasons), outcome.reasons
    assert_close(outcome.module(x), model(x))


class Casts(nn.Module):
    """Layers of two dtypes on one value, which autocast of weights allows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.q(x) + self.k(x)


def test_layers_of_two_dtypes_stay() -> None:
    model, x = Casts().eval(), torch.randn(3, 8)
    model.k.bfloat16()
    outcome = run(Merge(), model, (x,))
    assert not outcome.changes
    assert outcome.reasons == [
        "q: it and 'k', on the same input, differ in dtype",
        "k: it and 'q', on the same input, differ in dtype",
    ]


def test_what_was_fused_stays() -> None:
    model, x = Parallel(gated).eval(), torch.randn(3, 8)
    program = captured(model, (x,))
    rewrite(Fuse(), program)
    outcome = rewrite(Merge(), program)
    assert outcome.reasons == ["q: what follows was fused into it; let 'merge' come before 'fuse'"]


@pytest.mark.parametrize(("options", "whats"), [({"exclude": "v"}, ["q: merged with 'k'"]), ({"include": "q"}, [])])
def test_chooses_by_name(options: dict[str, str], whats: list[str]) -> None:
    assert run(Merge(**options), Parallel(heads).eval(), (torch.randn(3, 5, 8),)).whats == whats


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    biases=st.lists(st.booleans(), min_size=4, max_size=4),
    shape=st.lists(st.integers(0, 3), min_size=0, max_size=3),
)
def test_any_widths_and_shapes(widths: list[int], biases: list[bool], shape: list[int]) -> None:
    class Any(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(3, w, bias=b) for w, b in zip(widths, biases, strict=False))

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [layer(x) for layer in self.layers]

    model, x = Any().eval(), torch.randn(*shape, 3)
    outcome = run(Merge(), model, (x,))
    assert len(outcome.changes) == 1
    expected = model(x)
    found = outcome.module(x)
    assert_close(found, expected)
    assert all(a.is_contiguous() for a in found)
