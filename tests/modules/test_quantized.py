"""Layers of torch.nn that use their weights as a whole, in their quantised forms: drop-ins, but for the rounding."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from fxopt.modules import FakeQuantize, quantized_weights
from passes.qat.scheme import Scheme
from passes.qat.whole import quantized_form
from tests.passes.programs import assert_close

SCHEME = Scheme.of("qat", bits=8, weights="", activations="", per_channel=True, observer="minmax")
ATTENTION: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "batch first": ({"batch_first": True}, {}),
    "no bias": ({"bias": False, "batch_first": True}, {}),
    "no weights": ({}, {"need_weights": False}),
    "each head's weights": ({}, {"average_attn_weights": False}),
    "other widths": ({"kdim": 6, "vdim": 10}, {}),
    "bool mask": ({}, {"attn_mask": torch.ones(5, 5).triu(1).bool()}),
    "float mask": ({}, {"attn_mask": torch.linspace(-1, 1, 25).reshape(5, 5)}),
    "mask by head": ({}, {"attn_mask": torch.linspace(-1, 1, 300).reshape(12, 5, 5)}),
    "padding": ({"batch_first": True}, {"key_padding_mask": torch.arange(5) > torch.tensor([[4], [2], [3]])}),
    "padding and mask": (
        {"batch_first": True},
        {
            "key_padding_mask": torch.arange(5) > torch.tensor([[4], [2], [3]]),
            "attn_mask": torch.ones(5, 5).triu(1).bool(),
            "is_causal": True,
            "need_weights": False,
        },
    ),
}


def form(module: nn.Module, inputs: tuple[str, ...] = ("query", "key", "value")) -> nn.Module:
    made, found = quantized_form(module, "m", SCHEME, lambda name: True, inputs, "")
    assert made is not module, found
    return made


def fakes(module: nn.Module) -> dict[str, FakeQuantize]:
    return {name: child for name, child in module.named_modules() if isinstance(child, FakeQuantize)}


class TestAttention:
    @pytest.mark.parametrize("name", ATTENTION)
    @pytest.mark.parametrize("kind", ["self", "cross"])
    def test_unrounded_it_is_the_plain_layer(self, name: str, kind: str) -> None:
        torch.manual_seed(0)
        options, arguments = ATTENTION[name]
        plain = nn.MultiheadAttention(8, 4, **options).eval()
        widths = (8, plain.kdim, plain.vdim)
        if kind == "self" and widths != (8, 8, 8):
            pytest.skip("its widths differ")
        shape = (3, 5) if plain.batch_first else (5, 3)
        given = [torch.randn(*shape, width) for width in widths]
        given = [given[0]] * 3 if kind == "self" else given
        made = form(plain)
        for fake in fakes(made).values():
            fake.ready = False
        assert_close(made(*given, **arguments), plain(*given, **arguments), 1e-5)
        assert [key for key in made.state_dict() if "fake_quant" not in key] == list(plain.state_dict())

    def test_without_a_batch(self) -> None:
        plain, x = nn.MultiheadAttention(8, 2).eval(), torch.randn(5, 8)
        made = form(plain, ("query",))
        for fake in fakes(made).values():
            fake.ready = False
        padding = torch.arange(5) > 2
        assert_close(made(x, x, x, padding), plain(x, x, x, padding), 1e-5)

    def test_all_it_multiplies_with_parameters_is_rounded(self) -> None:
        torch.manual_seed(0)
        plain, x = nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)
        made = form(plain, ("query",))
        out = made(x, x, x)[0]
        assert 20 < 10 * torch.log10(out.square().mean() / (out - plain(x, x, x)[0]).square().mean()) < 60
        assert fakes(made).keys() == {
            "in_proj_weight_fake_quant", "query_fake_quant", "out_proj.weight_fake_quant", "out_proj.input_fake_quant"
        }  # fmt: skip
        assert all(fake.ready for fake in fakes(made).values())
        out.sum().backward()
        assert all(parameter.grad is not None for parameter in made.parameters())

    def test_a_causal_hint_needs_the_mask(self) -> None:
        x = torch.randn(5, 3, 8)
        with pytest.raises(ValueError, match="give the mask too"):
            form(nn.MultiheadAttention(8, 2))(x, x, x, is_causal=True)


@pytest.mark.parametrize(
    ("plain", "x"),
    [
        (nn.LSTM(6, 8, 2, bidirectional=True), torch.randn(5, 3, 6)),
        (nn.GRU(6, 8, batch_first=True), torch.randn(5, 3, 6)),
        (nn.RNN(6, 8), torch.randn(5, 3, 6)),
        (nn.LSTMCell(6, 8), torch.randn(3, 6)),
        (nn.GRUCell(6, 8), torch.randn(3, 6)),
        (nn.RNNCell(6, 8), torch.randn(3, 6)),
        (nn.Embedding(20, 8, padding_idx=0), torch.arange(12).reshape(3, 4)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_weights_are_rounded_while_it_runs_and_train(plain: nn.Module, x: torch.Tensor) -> None:
    made = form(plain)
    before = copy.deepcopy(plain.state_dict())
    rounded = copy.deepcopy(plain)
    for _, _, leaf, fake in quantized_weights(made):
        rounded.get_parameter(leaf).data = fake(plain.get_parameter(leaf)).detach()
    out, wanted = made(x), rounded(x)
    assert_close(out, wanted, 1e-6)
    assert not torch.equal(torch.utils._pytree.tree_leaves(out)[0], torch.utils._pytree.tree_leaves(plain(x))[0])
    torch.utils._pytree.tree_leaves(out)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in made.parameters())
    assert_close({name: made.state_dict()[name] for name in before}, before, 0)
    assert_close(pickle.loads(pickle.dumps(made))(x), out, 0)


@pytest.mark.parametrize(
    ("plain", "reason"),
    [
        (nn.Embedding(4, 2, max_norm=1.0), "its 'max_norm' rewrites the weight"),
        (nn.Embedding(4, 2, sparse=True), "its gradient is sparse"),
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), "'bias_k', 'bias_v' or 'add_zero_attn'"),
        (nn.MultiheadAttention(8, 2, add_zero_attn=True), "'bias_k', 'bias_v' or 'add_zero_attn'"),
        (torch.nn.utils.parametrizations.weight_norm(nn.LSTM(4, 4), "weight_ih_l0"), "parametrized: 'weight_ih_l0'"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_it_cannot_hold_stays_as_it_is(plain: nn.Module, reason: str) -> None:
    made, (skip,) = quantized_form(plain, "m", SCHEME, lambda name: True, ("query",), "")
    assert made is plain
    assert reason in skip.reason  # type: ignore[union-attr]


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype:UserWarning")  # the plain encoder's fast path
@pytest.mark.parametrize("kind", ["encoder", "decoder", "both"])
def test_transformers_are_quantised_layer_by_layer(kind: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"dim_feedforward": 16, "batch_first": True, "dropout": 0.0}
    x, y = torch.randn(3, 5, 8), torch.randn(3, 4, 8)
    if kind == "encoder":
        plain: nn.Module = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, **options), 2)
        inputs: tuple[Any, ...] = (x, None, torch.arange(5) > torch.tensor([[4], [2], [3]]))
    elif kind == "decoder":
        plain, inputs = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, **options), 2), (y, x)
    else:
        plain, inputs = nn.Transformer(8, 2, 1, 1, **options), (x, y)
    plain.eval()
    keys = list(plain.state_dict())
    made = form(plain)
    with torch.no_grad():  # where the fast path would not see any of it
        wanted = plain(*inputs)
        unready = [fake for fake in fakes(made).values() if fake.axis is None]
        assert unready and not any(fake.ready for fake in unready)
        found = made.train()(*inputs)
        assert all(fake.ready for fake in fakes(made).values())
        rounded = made.eval()(*inputs)
    kept = torch.ones(3, 5, dtype=torch.bool) if kind != "encoder" else ~inputs[2]
    kept = kept[:, : wanted.shape[1]]
    assert_close(rounded, found, 1e-4)
    noise = (rounded - wanted)[kept].square().mean() / wanted[kept].square().mean()
    assert 1e-6 < noise < 1e-2
    assert [key for key in made.state_dict() if "fake_quant" not in key] == keys
    again, found_again = quantized_form(made, "m", SCHEME, lambda name: True, ("query",), "")
    assert again is made and not found_again
