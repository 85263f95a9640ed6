"""attention: which formulas become operators, which stay and why, in both modes, with other sizes and gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx as fx
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxopt
from fxopt.capture import capture
from passes import Attention
from tests.passes.programs import Outcome, assert_close, run

Forward = Callable[..., Any]
LEAST = torch.finfo(torch.float32).min


class Formula(nn.Module):
    """A forward with some parameters and layers at hand."""

    def __init__(self, forward: Forward):
        super().__init__()
        self.run = forward
        self.weight = nn.Parameter(torch.rand(8) + 0.5)
        self.bias = nn.Parameter(torch.randn(8))
        self.table = nn.Parameter(torch.randn(4, 5, 5))
        self.temperature = nn.Parameter(torch.rand(4, 1, 1) + 0.5)
        self.register_buffer("seen", torch.ones(5, 5).tril())
        self.register_buffer("fill", torch.tensor(-math.inf))
        self.drop = nn.Dropout(0.4)
        self.still = nn.Dropout(0.0)
        self.softmax = nn.Softmax(-1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.run(self, *inputs)


def before(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Scaled before the product, transposed as an attribute, softmax as a method."""
    return (q * 8**-0.5 @ k.mT).softmax(-1) @ v


def plain(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.matmul(F.softmax(torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(8), dim=-1), v)


def by_equation(scores: str, result: str) -> Forward:
    """Attention whose products are equations, with heads where they put them."""

    def forward(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if scores.startswith("bl"):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        weights = torch.einsum(scores, q, k).masked_fill_(self.seen == 0, -math.inf)
        return torch.einsum(result, (0.25 * weights).softmax(-1), v)

    return forward


def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return q @ k.transpose(2, 3) / math.sqrt(q.size(-1))


def causal(length: int) -> torch.Tensor:
    return torch.triu(torch.ones(length, length), diagonal=1).bool()


def window(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """A mask by window: two windows make an image."""
    a = scores(q, k) + self.table
    a = a.view(-1, 2, 4, 5, 5) + self.table[:2].unsqueeze(1).unsqueeze(0)
    return a.view(-1, 4, 5, 5).softmax(-1) @ v


def repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, times, length, width).reshape(batch, heads * times, length, width)


def in_three(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Heads in the batch, a mask for each of these, and a view that needs what it had."""
    q, k, v = (x.reshape(-1, 5, 8) for x in (q, k, v))
    a = torch.bmm(q, k.transpose(1, 2)).masked_fill(causal(5).expand(q.shape[0], 5, 5), -math.inf)
    return torch.bmm(torch.softmax(a, -1), v).view(-1, 4, 5, 8)


def cast(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    a = scores(q, k)
    a += self.table
    return F.softmax(a.float(), dim=-1, dtype=torch.float32).type_as(a) @ v


def scaled_in_place(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q = torch.cos(q)
    q *= 8**-0.5
    return (q @ k.mT).softmax(-1) @ v


def transposed_in_place(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ torch.cos(k).transpose_(-2, -1)).softmax(-1) @ v


def written_once_scaled(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q = torch.cos(q)
    scaled = q * 8**-0.5
    q.zero_()
    return (scaled @ k.mT).softmax(-1) @ v


def edited(mask: torch.Tensor, *, value: float) -> torch.Tensor:
    """All queries see the first keys, as those of a prefix."""
    mask[:, :2] = value
    return mask


def written_repetitions(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Keys of one group that differ."""
    k, v = (x[:, :2].repeat_interleave(2, dim=1) for x in (k, v))
    k[:, 0] = 0
    return before(self, q, k, v)


def prefixed(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    hidden = edited(causal(5), value=False)
    return scores(q, k).masked_fill(hidden, -math.inf).softmax(-1) @ v


ATTENTION: dict[str, tuple[Forward, dict[str, Any]]] = {
    "plain": (plain, {"scale": 8**-0.5}),
    "scaled before": (before, {"scale": 8**-0.5}),
    "scaled in place": (scaled_in_place, {"scale": 1.0}),
    "transposed in place": (transposed_in_place, {"scale": 1.0}),
    "written once it was scaled": (written_once_scaled, {"scale": 1.0}),
    "equations": (by_equation("b h i d, b h j d -> b h i j", "b h i j, b h j d -> b h i d"), {"attn_mask": ()}),
    "equations of heads behind": (by_equation("blhe,bshe->bhls", "bhls,bshd->blhd"), {"attn_mask": ()}),
    "no scale": (lambda self, q, k, v: (q @ k.mT).softmax(3) @ v, {"scale": 1.0}),
    "scaled twice": (lambda self, q, k, v: (2 * (q * 0.25) @ (k / 2).mT * 0.5).softmax(-1) @ v, {"scale": 0.125}),
    "scaled by the length": (lambda self, q, k, v: (q @ k.mT * q.size(0) ** -0.5).softmax(-1) @ v, {}),
    "temperature": (lambda self, q, k, v: (q @ k.mT * self.temperature).softmax(-1) @ v, {"scale": 1.0}),
    "bias": (lambda self, q, k, v: (scores(q, k) + self.table).softmax(-1) @ v, {"attn_mask": ()}),
    "bias first": (lambda self, q, k, v: self.softmax(self.table + q @ k.mT) @ v, {"attn_mask": ()}),
    "two biases": (
        lambda self, q, k, v: (scores(q, k) + self.table + self.seen).softmax(-1) @ v,
        {"attn_mask": ()},
    ),
    "by window": (window, {"attn_mask": ()}),
    "masked": (
        lambda self, q, k, v: scores(q, k).masked_fill(self.seen == 0, -math.inf).softmax(-1) @ v,
        {"attn_mask": ()},
    ),
    "masked by a large number": (
        lambda self, q, k, v: scores(q, k).masked_fill(self.seen == 0, -1e9).softmax(-1) @ v,
        {"attn_mask": ()},
    ),
    "masked by where": (
        lambda self, q, k, v: torch.where(self.seen > 0, scores(q, k), self.fill).softmax(-1) @ v,
        {"attn_mask": ()},
    ),
    "masked and biased": (
        lambda self, q, k, v: (scores(q, k) + self.table).masked_fill(self.seen == 0, -math.inf).softmax(-1) @ v,
        {"attn_mask": ()},
    ),
    "masked, then scaled": (
        lambda self, q, k, v: ((q @ k.mT).masked_fill(self.seen == 0, -math.inf) * 0.5).softmax(-1) @ v,
        {"attn_mask": (), "scale": 0.5},
    ),
    "causal": (
        lambda self, q, k, v: scores(q, k).masked_fill(causal(q.shape[2]), -math.inf).softmax(-1) @ v,
        {"is_causal": True},
    ),
    "causal by tril": (
        lambda self, q, k, v: (
            scores(q, k).masked_fill(torch.tril(torch.ones(5, 5))[None, None] == 0, -1e10).softmax(-1) @ v
        ),
        {"is_causal": True},
    ),
    "causal by addition": (
        lambda self, q, k, v: (scores(q, k) + torch.triu(torch.full((5, 5), -math.inf), 1)).softmax(-1) @ v,
        {"is_causal": True},
    ),
    "causal in place": (
        lambda self, q, k, v: scores(q, k).masked_fill(torch.ones(5, 5).tril_() == 0, -1e10).softmax(-1) @ v,
        {"is_causal": True},
    ),
    "causal behind a prefix": (
        lambda self, q, k, v: (
            scores(q, k).masked_fill(edited(torch.tril(torch.ones(5, 5)), value=1) == 0, -1e10).softmax(-1) @ v
        ),
        {"attn_mask": ()},
    ),
    "causal behind a prefix of booleans": (prefixed, {"attn_mask": ()}),
    "causal, of what was edited": (
        lambda self, q, k, v: (
            (scores(q, k) + torch.triu(edited(torch.full((5, 5), -math.inf), value=0), 1)).softmax(-1) @ v
        ),
        {"attn_mask": ()},
    ),
    "below the causal diagonal": (
        lambda self, q, k, v: (
            scores(q, k).masked_fill(torch.triu(torch.ones(5, 5), diagonal=2).bool(), -math.inf).softmax(-1) @ v
        ),
        {"attn_mask": ()},
    ),
    "dropout": (lambda self, q, k, v: self.drop(scores(q, k).softmax(-1)) @ v, {"dropout_p": ()}),
    "dropout as a function": (
        lambda self, q, k, v: F.dropout(scores(q, k).softmax(-1), 0.3, self.training) @ v,
        {"dropout_p": ()},
    ),
    "dropout of nothing": (lambda self, q, k, v: self.still(scores(q, k).softmax(-1)) @ v, {}),
    "grouped": (
        lambda self, q, k, v: before(self, q, repeated(k[:, :2], 2), repeated(v[:, :2], 2)),
        {"enable_gqa": True},
    ),
    "grouped by repetition": (
        lambda self, q, k, v: before(
            self, q, k[:, :2].repeat_interleave(2, dim=1), torch.repeat_interleave(v[:, :2], 2, 1)
        ),
        {"enable_gqa": True},
    ),
    "grouped by a repetition that is written": (written_repetitions, {"scale": 8**-0.5}),
    "grouped, keys alone": (lambda self, q, k, v: before(self, q, repeated(k[:, :2], 2), v), {"scale": 8**-0.5}),
    "three dimensions": (in_three, {"attn_mask": ()}),
    "cast and added in place": (cast, {"attn_mask": ()}),
    "values are wider": (lambda self, q, k, v: plain(self, q, k, torch.cat([v, v], -1)), {"scale": 8**-0.5}),
    "keys of another length": (lambda self, q, k, v: plain(self, q, k[:, :, 1:], v[:, :, 1:]), {"scale": 8**-0.5}),
    "seen as one": (lambda self, q, k, v: plain(self, q, k, v).view(-1, 20, 8), {"scale": 8**-0.5}),
    "attributes of the scores": (
        lambda self, q, k, v: torch.permute(plain(self, q, k, v), (0, 2, 1, 3)).reshape(-1, 5, 32),
        {"scale": 8**-0.5},
    ),
}


def heads(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 4, 5, 8), torch.randn(batch, 4, 5, 8), torch.randn(batch, 4, 5, 8)


def operators(outcome: Outcome) -> list[Any]:
    kinds = (F.scaled_dot_product_attention, F.layer_norm, F.rms_norm, F.gelu, F.silu)
    return [node for node in outcome.module.graph.nodes if node.op == "call_function" and node.target in kinds]


def same_gradients(model: nn.Module, module: nn.Module, inputs: tuple[torch.Tensor, ...], tolerance: float) -> None:
    found = []
    for each in (model, module):
        given = [x.detach().clone().requires_grad_() for x in inputs]
        torch.manual_seed(0)
        each(*given).square().sum().backward()
        found.append(([x.grad for x in given], {name: p.grad for name, p in each.named_parameters()}))
    (left, mine), (right, theirs) = found
    assert_close(right, left, tolerance)
    assert mine.keys() == theirs.keys()
    for name, gradient in mine.items():
        assert (gradient is None) is (theirs[name] is None)
        if gradient is not None:
            assert_close(theirs[name], gradient, tolerance)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_recognised(name: str, training: bool) -> None:
    forward, options = ATTENTION[name]
    torch.manual_seed(0)
    model = Formula(forward).train(training)
    outcome = run(Attention(), model, heads())
    (node,) = operators(outcome)
    assert node.target is F.scaled_dot_product_attention
    assert {"attn_mask", "is_causal", "dropout_p", "enable_gqa"} & node.kwargs.keys() == options.keys() - {"scale"}
    assert {key: node.kwargs[key] for key in options if options[key] != ()} == pytest.approx(
        {key: value for key, value in options.items() if value != ()}
    )
    assert "softmax" not in outcome.calls
    for batch in (2, 4):
        same_gradients(model, outcome.module, heads(batch), 1e-4)


@pytest.mark.parametrize("name", ["dropout", "dropout as a function"])
def test_dropout_follows_the_mode(name: str) -> None:
    """A graph that was rewritten for one mode still runs in the other."""
    model, inputs = Formula(ATTENTION[name][0]).eval(), heads()
    module = run(Attention(), model, inputs).module
    for mode in (True, False, True):
        torch.manual_seed(1)
        expected = model.train(mode)(*inputs)
        torch.manual_seed(1)
        assert_close(module.train(mode)(*inputs), expected)
        assert torch.equal(module(*inputs), module(*inputs)) is not mode


def dropped_twice(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.dropout(self.drop(scores(q, k).softmax(-1)), 0.2, self.training) @ v


def values_dropped(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return self.drop(scores(q, k).softmax(-1)) @ self.drop(v)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (dropped_twice, "the attention weights are dropped twice"),
        (values_dropped, "its dropout would draw random numbers after 'drop'"),
    ],
)
def test_dropout_that_attention_would_draw_otherwise_stays(forward: Forward, reason: str) -> None:
    model = Formula(forward).train()
    result = fxopt.optimize(model, heads(), [Attention()], devices=())
    (entry,) = result.ledger.entries
    assert not entry.changes and reason in entry.skips[0].reason
    (skip,) = run(Attention(), Formula(dropped_twice).eval(), heads()).skips
    assert "dropped twice" in skip.reason, "it may train later"
    assert operators(run(Attention(), Formula(values_dropped).eval(), heads()))


def returned(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    a = scores(q, k).softmax(-1)
    return a @ v, a


@pytest.mark.parametrize(
    "scale",
    [
        lambda q: 1 / math.sqrt(q.size(-1)),
        lambda q: q.shape[-1] ** -0.5,
        lambda q: 1.0 / float(q.size(3)) ** 0.5,
        lambda q: 1 / math.sqrt(q.shape[1] * q.shape[3] // 4),
    ],
)
def test_a_scale_of_sizes_stays_a_number(scale: Callable[[torch.Tensor], float]) -> None:
    model = Formula(lambda self, q, k, v: (q @ k.mT * scale(q)).softmax(-1) @ v)
    outcome = run(Attention(), model, heads())
    (node,) = operators(outcome)
    assert isinstance(node.kwargs["scale"], fx.Node)
    assert "mul" not in [each.name for each in outcome.module.graph.nodes if "tensor_meta" in each.meta]
    for batch in (2, 3):
        given = heads(batch)
        with torch.no_grad():
            assert_close(outcome.module(*given), model(*given), 1e-5)


def scores_too(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    a = scores(q, k)
    return a.softmax(-1) @ v + a.sum(-1, keepdim=True)


def writes(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q = torch.cos(q)
    a = scores(q, k)
    q[0].zero_()
    return a.softmax(-1) @ v + q


def strided(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return plain(self, q, k, v).as_strided((5, 8), (8, 1))


STAYS: dict[str, tuple[Forward, str]] = {
    "weights returned": (returned, "attention weights are used by 'output' too"),
    "scores used": (scores_too, "the scores are used by 'sum_1' too"),
    "another value": (
        lambda self, q, k, v: scores(q, k).masked_fill(self.seen == 0, -10.0).softmax(-1) @ v,
        "it fills masked scores with -10",
    ),
    "scale by query": (
        lambda self, q, k, v: (q @ k.mT * q.sum(-1, keepdim=True)).softmax(-1) @ v,
        "it is not one for all queries and keys",
    ),
    "scaled after a bias": (
        lambda self, q, k, v: ((q @ k.mT + self.table) * 0.5).softmax(-1) @ v,
        "scaled after they are masked",
    ),
    "negative": (lambda self, q, k, v: (q @ k.mT * -0.5).softmax(-1) @ v, "its scale is -0.5"),
    "two dimensions": (
        lambda self, q, k, v: plain(self, q[0, 0], k[0, 0], v[0, 0]),
        "must have 3 dimensions or more",
    ),
    "shared keys": (lambda self, q, k, v: plain(self, q, k[:1, :1], v), "differ in the sizes before the last two"),
    "written": (writes, "writes into"),
    "strides": (strided, "'as_strided' looks at its strides"),
}


@pytest.mark.parametrize("name", STAYS)
def test_attention_stays_with_the_reason(name: str) -> None:
    forward, reason = STAYS[name]
    model, inputs = Formula(forward).eval(), heads()
    outcome = run(Attention(), model, inputs)
    assert not outcome.changes
    assert len(outcome.skips) == 1
    assert reason in outcome.skips[0].reason
    assert_close(outcome.module(*inputs), model(*inputs))


NOT_OURS: dict[str, Forward] = {
    "over queries": lambda self, q, k, v: (q @ k.mT).softmax(-2) @ v,
    "a softmax of something else": lambda self, q, k, v: torch.cos(q).softmax(-1) @ v.mT,
    "no values": lambda self, q, k, v: (q @ k.mT).softmax(-1),
    "weights on the other side": lambda self, q, k, v: v.mT @ (q @ k.mT).softmax(-1),
    "quick gelu": lambda self, q, k, v: q * torch.sigmoid(1.702 * q),
    "half a gelu": lambda self, q, k, v: 0.5 * q * (1 + torch.erf(q)),
    "gate": lambda self, q, k, v: q * torch.sigmoid(k),
    "by nothing": lambda self, q, k, v: q * torch.sigmoid(q / 0.0),
    "too large for a number": lambda self, q, k, v: q * torch.sigmoid((1e-300 * q) ** -2),
    "no eps": lambda self, q, k, v: q * torch.rsqrt(q.pow(2).mean(-1, keepdim=True)),
    "unbiased": lambda self, q, k, v: (q - q.mean(-1, keepdim=True)) / torch.sqrt(q.var(-1, keepdim=True) + 1e-5),
    "mean of another": lambda self, q, k, v: (
        (q - k.mean(-1, keepdim=True)) * torch.rsqrt(q.var(-1, keepdim=True, unbiased=False) + 1e-5)
    ),
    "distance": lambda self, q, k, v: torch.sqrt((q - k).pow(2).mean(-1, keepdim=True) + 1e-5),
    "complex silu": lambda self, q, k, v: (lambda z: z * torch.sigmoid(z))(torch.complex(q, k)),
    "complex rms norm": lambda self, q, k, v: (lambda z: z * torch.rsqrt((z * z).mean(-1, keepdim=True) + 1e-5))(
        torch.complex(q, k)
    ),
    "complex layer norm": lambda self, q, k, v: (lambda z: centred(z) * torch.rsqrt(variance(z) + 1e-5))(
        torch.complex(q, k)
    ),
}


PRODUCTS = {
    "bhid,bhjd->bhij": 1,
    "bhjd,bhid->bhij": 1,
    "bhid,bhjd->bijh": 1,
    "bhid,bhjd->bhi": 0,
    "bhid,bhid->bhi": 0,
    "bhii,bhjd->bhij": 0,
    "...id,...jd->...ij": 0,
    "bhid,bhjd": 0,
}


@pytest.mark.parametrize("equation", PRODUCTS)
def test_an_equation_becomes_the_matrix_product_that_it_is(equation: str) -> None:
    queries = torch.randn(2, 4, 8, 8)
    model = Formula(lambda self, q, k: torch.einsum(equation, q, k))
    outcome = run(Attention(), model.eval(), (queries, queries + 1))
    assert [change.what for change in outcome.changes] == ["computed by matmul"] * PRODUCTS[equation]
    for batch in (2, 4):
        inputs = torch.randn(batch, 4, 8, 8), torch.randn(batch, 4, 8, 8)
        assert_close(outcome.module(*inputs), model(*inputs))


@pytest.mark.parametrize("name", NOT_OURS)
def test_says_nothing_of_other_formulas(name: str) -> None:
    outcome = run(Attention(), Formula(NOT_OURS[name]).eval(), heads())
    assert not outcome.changes
    assert not outcome.skips


def variance(x: torch.Tensor) -> torch.Tensor:
    return torch.var(x, dim=-1, unbiased=False, keepdim=True)


def centred(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(-1, keepdim=True)


def rms(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float32) * torch.rsqrt(x.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)


def tanh_gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))


FORMULAS: dict[str, tuple[Forward, Any, int]] = {
    "layer norm by var": (
        lambda self, x: centred(x) / torch.sqrt(variance(x) + 1e-5) * self.weight + self.bias, F.layer_norm, 5),
    "layer norm by hand": (
        lambda self, x: self.bias + self.weight * (centred(x) * (centred(x).pow(2).mean(-1, True) + 1e-5) ** -0.5),
        F.layer_norm, 5),
    "layer norm, squared by multiplication": (
        lambda self, x: (lambda d: d / ((d * d).mean(dim=-1, keepdim=True) + 1e-5).sqrt())(centred(x)),
        F.layer_norm, 5),
    "layer norm of a sum, without bias": (
        lambda self, x: (lambda y: centred(y) * torch.rsqrt(variance(y) + 1e-5) * self.weight)(x + x.cos()),
        F.layer_norm, 5),
    "rms norm": (lambda self, x: self.weight * rms(x).to(x.dtype), F.rms_norm, 4),
    "rms norm by division": (
        lambda self, x: x / torch.sqrt(torch.mean(torch.square(x), -1, keepdim=True) + 1e-6), F.rms_norm, 4),
    "rms norm, one and a weight": (lambda self, x: rms(x) * (1.0 + self.weight), F.rms_norm, 4),
    "gelu": (lambda self, x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))), F.gelu, 1),
    "gelu, distributed": (lambda self, x: 0.5 * x + 0.5 * x * torch.erf(x * 0.7071067811865475), F.gelu, 1),
    "gelu by its distribution": (lambda self, x: x * (0.5 * (torch.erf(x / 1.41421) + 1)), F.gelu, 1),
    "gelu of a sum": (
        lambda self, x: (lambda y: y * 0.5 * (1.0 + torch.erf(y / math.sqrt(2.0))))(x + self.bias), F.gelu, 1),
    "tanh gelu": (lambda self, x: tanh_gelu(x), F.gelu, 1),
    "tanh gelu, factored": (
        lambda self, x: 0.5 * x * (1 + torch.tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x))), F.gelu, 1),
    "silu": (lambda self, x: x * torch.sigmoid(x), F.silu, 1),
    "silu by module": (lambda self, x: self.sigmoid(x) * x, F.silu, 1),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", FORMULAS)
def test_norms_and_activations_are_recognised(name: str, training: bool) -> None:
    forward, function, arguments = FORMULAS[name]
    torch.manual_seed(0)
    model = Formula(forward).train(training)
    outcome = run(Attention(), model, (torch.randn(3, 5, 8),))
    (node,) = operators(outcome)
    assert node.target is function
    assert len(node.args) == arguments
    assert not {"rsqrt", "sqrt", "mean", "var", "erf", "tanh", "sigmoid", "pow"} & set(outcome.calls)
    for shape in ((3, 5, 8), (1, 2, 8)):
        same_gradients(model, outcome.module, (torch.randn(*shape),), 1e-4)


OTHER_STAYS: dict[str, tuple[Forward, str]] = {
    "channels first": (
        lambda self, x: (x - x.mean(1, keepdim=True)) / torch.sqrt(x.var(1, keepdim=True, unbiased=False) + 1e-5),
        "it normalises over 1",
    ),
    "in place": (lambda self, x: torch.cos(x).mul_(torch.sigmoid(torch.cos(x))) * 0 + swish(x), "computed in place"),
}


def swish(x: torch.Tensor) -> torch.Tensor:
    y = torch.cos(x)
    return y.mul_(y.sigmoid())


@pytest.mark.parametrize("name", OTHER_STAYS)
def test_norms_and_activations_stay_with_the_reason(name: str) -> None:
    forward, reason = OTHER_STAYS[name]
    model, x = Formula(forward).eval(), torch.randn(3, 5, 8)
    outcome = run(Attention(), model, (x,))
    assert not outcome.changes
    assert [reason in skip.reason for skip in outcome.skips] == [True]
    assert_close(outcome.module(x), model(x))


@pytest.mark.parametrize(("name", "options"), [("rms norm", {"norms": False}), ("gelu", {"activations": False})])
def test_leaves_what_it_is_told_to(name: str, options: dict[str, bool]) -> None:
    assert not run(Attention(**options), Formula(FORMULAS[name][0]).eval(), (torch.randn(3, 8),)).changes


class TwoGraphs(Formula):
    def forward(self, *inputs: torch.Tensor) -> Any:
        y = self.run(self, *inputs)
        return torch.tanh(y) if self.training else y


def test_both_graphs_are_rewritten() -> None:
    model, inputs = TwoGraphs(ATTENTION["dropout"][0]).eval(), heads()
    outcome = run(Attention(), model, inputs)
    assert len(outcome.changes) == 2
    for mode in (True, False):
        assert len(operators(Outcome(outcome.module.train(mode)))) == 1
        torch.manual_seed(0)
        expected = model.train(mode)(*inputs)
        torch.manual_seed(0)
        assert_close(outcome.module(*inputs), expected)


@settings(max_examples=30, deadline=None)
@given(
    batch=st.integers(1, 3),
    heads=st.sampled_from([1, 2, 4]),
    lengths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    mask=st.sampled_from(["none", "bias", "keep", "drop", "large"]),
    scale=st.floats(0.05, 4.0),
    outside=st.booleans(),
)
def test_any_sizes(
    batch: int, heads: int, lengths: tuple[int, int], widths: tuple[int, int], mask: str, scale: float, outside: bool
) -> None:
    generator = torch.Generator().manual_seed(batch * 100 + lengths[0] * 10 + lengths[1])
    q = torch.randn(batch, heads, lengths[0], widths[0], generator=generator)
    k = torch.randn(batch, heads, lengths[1], widths[0], generator=generator)
    v = torch.randn(batch, heads, lengths[1], widths[1], generator=generator)
    seen = torch.rand(heads, lengths[0], lengths[1], generator=generator) > 0.4
    seen[..., 0] = True

    def forward(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        a = q @ k.transpose(-2, -1)
        a = a * scale if outside else a / scale
        if mask == "bias":
            a = a + self.seen.float()
        elif mask == "keep":
            a = torch.where(self.seen, a, -math.inf)
        elif mask in ("drop", "large"):
            a = a.masked_fill(~self.seen, -math.inf if mask == "drop" else torch.finfo(a.dtype).min)
        return a.softmax(-1) @ v

    model = Formula(forward).eval()
    model.seen = seen
    outcome = run(Attention(), model, (q, k, v))
    assert len(operators(outcome)) == 1
    assert_close(outcome.module(q, k, v), model(q, k, v), 1e-4)


def test_a_query_without_keys_gives_zero() -> None:
    forward = ATTENTION["masked"][0]
    model, inputs = Formula(forward).eval(), heads()
    model.seen[2] = 0
    outcome = run(Attention(), model, inputs)
    assert model(*inputs)[:, :, 2].isnan().all()
    assert not outcome.module(*inputs)[:, :, 2].any()


@pytest.mark.parametrize("trains", [False, True])
def test_a_mask_that_is_an_input_may_hide_all_keys_of_a_query_in_random_ones(trains: bool) -> None:
    def forward(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        a = scores(q, k).masked_fill(self.seen == 0, -math.inf).masked_fill(~keep[:, None, None, :], -math.inf)
        return a.softmax(-1) @ v * self.weight

    keep = torch.tensor([[True] * 5, [True, True, True, False, False]])
    model = Formula(forward).train(trains)
    inputs = (*heads(), keep)
    result = fxopt.optimize(model, inputs, [Attention()], devices=())
    assert len(result.ledger.entries[0].changes) == 1
    assert_close(result.module(*inputs), model(*inputs), 1e-4)


@pytest.mark.parametrize(
    "fills",
    [
        (LEAST, LEAST),
        (-1e9, -1e9),
        (-1e9, -2e9),
        (-math.inf, -1e9),
    ],
)
@pytest.mark.parametrize("added", [False, True])
def test_a_query_without_keys_sees_those_of_the_last_mask_alike(fills: tuple[float, float], added: bool) -> None:
    """Two masks of which one hides the later keys, the other the first, as padding on the left does."""

    def forward(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        a = scores(q, k)
        hidden = self.seen == 0
        a = a + torch.zeros(5, 5).masked_fill(hidden, fills[0]) if added else a.masked_fill(hidden, fills[0])
        return a.masked_fill(torch.arange(5) < 2, fills[1]).softmax(-1) @ v

    model, inputs = Formula(forward).eval(), heads()
    outcome = run(Attention(), model, inputs)
    assert len(operators(outcome)) == 1
    assert_close(outcome.module(*inputs), model(*inputs), 1e-4)


@pytest.mark.parametrize(
    ("dtype", "fill", "is_recognised"),
    [
        (torch.bfloat16, torch.finfo(torch.bfloat16).min, True),
        (torch.bfloat16, LEAST, True),
        (torch.bfloat16, -1e9, True),
        (torch.bfloat16, -1e4, False),
        (torch.float16, torch.finfo(torch.float16).min, False),
        (torch.float16, LEAST, False),
        (torch.float16, -math.inf, True),
    ],
)
def test_a_fill_counts_as_lost_if_it_is_in_the_dtype_of_the_queries(
    dtype: torch.dtype, fill: float, is_recognised: bool
) -> None:
    """Scores may be masked in float32; the operator takes masks in the dtype of the queries, and adds in float32."""

    def forward(self: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        a = scores(q, k).to(torch.promote_types(dtype, torch.float32 if fill == LEAST else dtype))
        return a.masked_fill(self.seen == 0, fill).softmax(-1).to(dtype) @ v

    model, inputs = Formula(forward).eval(), tuple(x.to(dtype) for x in heads())
    if math.isfinite(fill):
        model.seen[2] = 0
    outcome = run(Attention(), model, inputs)
    assert len(operators(outcome)) == is_recognised
    assert is_recognised or "which shows where all keys" in outcome.skips[0].reason
    assert_close(outcome.module(*inputs).float(), model(*inputs).float(), 5e-2)


def test_a_whole_layer_through_the_pipeline() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
            self.weight = nn.Parameter(torch.rand(16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = rms(x) * self.weight
            q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(y).chunk(3, dim=-1))
            y = scores(q, k).masked_fill(causal(x.shape[1]), -math.inf).softmax(-1) @ v
            return x + tanh_gelu(self.out(y.transpose(1, 2).flatten(2)))

    torch.manual_seed(0)
    model, x = Layer().train(), torch.randn(2, 6, 16)
    state = copy.deepcopy(model.state_dict())
    result = fxopt.optimize(model, x, "clean,attention", devices=())
    assert len(result.ledger.entries[-1].changes) == 3
    assert list(result.module.state_dict()) == list(state)
    assert_close(capture(result.module, (x,)).module(x), model(x))
