"""Inputs of a model: how they are told of, and random ones like them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from fxopt.errors import LoadError
from fxopt.inputs import Inputs


class Cache:
    def __init__(self) -> None:
        self.keys, self.steps = [torch.zeros(2, 4)], 3


class Kind:
    pass


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3), "2x3 float32"),
        ({"ids": torch.zeros(1, dtype=torch.int64), "n": 3}, "ids=1 int64, n=3"),
        ((Cache(), [torch.zeros(())]), "Cache(2x4 float32), [scalar float32]"),
        ((Kind(),), "<tests.test_inputs.Kind object>"),
        ((partial(Kind),), "functools.partial(<class 'tests.test_inputs.Kind'>)"),
    ],
)
def test_what_is_said_of_them_is_the_same_in_each_process(value: object, text: str) -> None:
    assert Inputs.of(value).describe() == text
    assert repr(Inputs.of(value)) == f"Inputs({text})"


def test_fresh_complex_numbers_have_both_parts() -> None:
    example = torch.complex(torch.randn(64), torch.zeros(64)) * torch.tensor(1 + 1j)
    for given in (example, example.conj()):
        (fresh,) = Inputs.of(given).fresh(0).args
        assert fresh.dtype is torch.complex64 and fresh.shape == (64,)
        assert fresh.real.std() > 0.5 and fresh.imag.std() > 0.5


def test_fresh_floats_keep_what_is_not_finite_where_it_is() -> None:
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    fresh = Inputs.of((mask, torch.full((2,), torch.inf), torch.tensor([1.0, torch.nan]))).fresh(0).args
    assert torch.equal(fresh[0].isinf(), mask.isinf())
    assert not torch.equal(fresh[0], mask)
    assert fresh[1].tolist() == [torch.inf, torch.inf]
    assert fresh[2].isnan().tolist() == [False, True]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int64])
def test_integers_of_every_width_are_drawn_within_the_example_and_repeated_by_rows(dtype: torch.dtype) -> None:
    example = torch.tensor([3, 5] * 8).to(dtype)
    (fresh,) = Inputs.of(example).fresh(0).args
    assert fresh.dtype is dtype and set(fresh.tolist()) == {3, 4, 5}
    batch = Inputs.of(example).with_batch(17)
    assert batch is not None and batch.args[0].tolist() == [3, 5] * 8 + [3]


@pytest.mark.parametrize("low", [-(2**63), 0, 2**63 - 1])
def test_the_largest_integer_may_stand_for_something(low: int) -> None:
    (fresh,) = Inputs.of(torch.tensor([low, 2**63 - 1])).fresh(0).args
    assert fresh.dtype is torch.int64 and bool((fresh >= low).all())


@pytest.mark.parametrize("static", ["lengths", 0])
def test_one_static_argument_is_given_in_a_list(static: str | int) -> None:
    with pytest.raises(LoadError, match=rf"takes a list of arguments, such as \[{static!r}\]"):
        Inputs((torch.ones(2),), {"lengths": torch.ones(2)}, static=static)  # type: ignore[arg-type]


def test_static_inputs_stay_as_they_are() -> None:
    lengths = torch.tensor([3, 1])
    example = Inputs((torch.randn(4, 2),), {"lengths": [lengths]}, static=["lengths"])
    assert example.batch_size == 4
    batch = example.with_batch(7)
    assert batch is not None and batch.args[0].shape == (7, 2)
    for other in (example.fresh(0), batch, example.fresh(1).double().to("cpu")):
        assert torch.equal(other.kwargs["lengths"][0], lengths) and other.static == example.static
    assert example.describe() == "4x2 float32, lengths=[2 int64] static"
