"""Verification: what counts as a difference, and what the oracle asks."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import fxopt
from fxopt import verify
from fxopt.capture import capture
from fxopt.capture.state import apart
from fxopt.contract import Promise
from fxopt.errors import LoadError
from fxopt.inputs import Inputs
from fxopt.outcome import Outcome, compare_outcomes, difference_of
from fxopt.pipeline import run_passes
from fxopt.relative_error import TOLERANCE, relative_error
from fxopt.verify import Oracle
from passes import Clean

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("expected", "found", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 2.5], 0.25),
        ([0.0, -4.0], [1.0, -4.0], 0.25),
        ([0.0], [0.0], 0.0),
        ([0.0], [1e-9], INF),
        ([NAN, 2.0], [NAN, 2.0], 0.0),
        ([NAN, 2.0], [1.0, 2.0], INF),
        ([1.0, 2.0], [NAN, 2.0], INF),
        ([INF, 2.0], [INF, 1.0], 0.5),
        ([INF, 2.0], [-INF, 2.0], INF),
        ([], [], 0.0),
        ([-1e9, 2.0, 4.0], [-1e9, 2.0, 5.0], 0.25),
        ([-1e9, 2.0, 4.0], [-2e9, 2.0, 4.0], 1.0),
        ([-1e9, 0.0, 0.0], [-1e9, 0.0, 1.0], 1e-9),
        ([-1e9, 5e7, 0.0], [-1e9, 5e7, 1.0], 1e-9),
    ],
)
def test_relative_error_is_the_largest_difference_over_the_largest_value(
    expected: list[float], found: list[float], error: float
) -> None:
    assert relative_error(torch.tensor(expected), torch.tensor(found)) == pytest.approx(error)


@pytest.mark.parametrize(
    ("expected", "found", "error"),
    [
        ([3, 4], [3, 5], 0.25),
        ([0, 1, 2, 20], [20, 1, 2, 20], 0.25),
        ([0, 0], [1, 1], 1.0),
        ([7], [7], 0.0),
        ([True], [False], 1.0),
        ([True] * 4, [True] * 3 + [False], 0.25),
    ],
)
def test_whole_numbers_and_booleans_differ_by_the_share_of_them_where_that_is_less(
    expected: list[int], found: list[int], error: float
) -> None:
    assert relative_error(torch.tensor(expected), torch.tensor(found)) == error


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(
    "made",
    [
        lambda values: values.to_sparse(),
        lambda values: torch.quantize_per_tensor(values.float(), 1.0, 0, torch.quint8),
        lambda values: values.bool(),
    ],
    ids=["sparse", "quantised", "booleans"],
)
def test_whole_numbers_of_any_form_are_compared(made: Callable[[torch.Tensor], torch.Tensor]) -> None:
    outcomes = [Outcome((made(torch.tensor(each)),), None, {}, {}) for each in ([0, 2, 3, 0], [0, 2, 0, 0])]
    assert difference_of(*outcomes, Promise.CLOSE).error == 0.25
    assert not difference_of(outcomes[0], outcomes[0], Promise.CLOSE).is_broken


@pytest.mark.parametrize(
    ("promise", "dtypes", "flips", "by", "is_broken"),
    [
        (Promise.CLOSE, {torch.float32}, 1, 20, False),
        (Promise.CLOSE, {torch.float32}, 100, 20, True),
        (Promise.CLOSE, {torch.float32}, 100_000, 1, True),
        (Promise.CLOSE, set(), 1, 20, True),
        (Promise.EXACT, {torch.float32}, 1, 20, True),
    ],
    ids=["a tie in floats", "too many for ties", "all by a little", "no floats to round", "exact"],
)
def test_a_class_may_be_another_where_two_are_as_good_as_equal(
    promise: Promise, dtypes: set[torch.dtype], flips: int, by: int, is_broken: bool
) -> None:
    before = torch.full((100_000,), 30_000)
    after = before.clone()
    after[:flips] += by
    outcomes = [Outcome((each,), None, {}, {}, frozenset(dtypes)) for each in (before, after)]
    assert difference_of(*outcomes, promise).is_broken is is_broken


class Counts(nn.Module):
    """Says what it was called with."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.seen: list[torch.Size] = []
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(x.shape)
        return self.linear(x)


def test_the_oracle_tries_fresh_inputs_and_another_batch_size_and_leaves_the_original_alone() -> None:
    module = Counts().eval()
    oracle = Oracle(module, Inputs((torch.ones(2, 3),)), fresh=2)
    assert [tuple(trial.inputs.tensors[0].shape) for trial in oracle.trials] == [(2, 3), (2, 3), (2, 3), (3, 3)]
    assert len({trial.inputs.tensors[0].sum().item() for trial in oracle.trials}) == 4
    assert module.seen == []
    assert module.calls == 0


@pytest.mark.parametrize(("batch", "batches"), [(1, [1, 1, 2]), (2, [2, 2, 3]), (8, [8, 8, 2])])
def test_a_model_that_takes_long_is_asked_less(batch: int, batches: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_AFFORDABLE_SECONDS", 0.0)
    oracle = Oracle(nn.Linear(3, 3).eval(), Inputs((torch.randn(batch, 3),)))
    assert [trial.inputs.batch_size for trial in oracle.trials] == batches
    assert all(trial.reference is trial.expected for trial in oracle.trials)


def test_random_models_are_compared_on_the_same_random_stream() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    inputs = Inputs((torch.ones(4, 8),))
    oracle = Oracle(module, inputs)
    found = oracle.outcomes(capture(module, inputs.args).module)
    assert compare_outcomes(oracle.expected(), found, Promise.EXACT).error == 0.0


def test_gradients_do_not_stay_in_the_module() -> None:
    module = nn.Linear(3, 3).train()
    kept = torch.ones(3, 3)
    module.weight.grad = kept
    oracle = Oracle(module, Inputs((torch.ones(2, 3),)))
    assert module.weight.grad is kept
    assert set(oracle.trials[0].expected.gradients) == {"weight", "bias"}


def test_the_error_is_measured_against_float64() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*[nn.Linear(64, 64) for _ in range(4)]).eval()
    oracle = Oracle(module, Inputs((torch.randn(8, 64),)))
    own = oracle.error(oracle.expected(), Promise.CLOSE)
    assert 0 < own < 1e-5


@pytest.mark.parametrize(("available", "is_wide"), [(None, True), (2 * 8 * 12, True), (2 * 8 * 12 - 1, False)])
def test_no_copy_in_float64_takes_most_of_the_memory(
    available: int | None, is_wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "available_bytes", lambda: available)
    oracle = Oracle(nn.Linear(3, 3).eval(), Inputs((torch.randn(2, 3),)))
    assert all((trial.reference is not trial.expected) is is_wide for trial in oracle.trials)


def test_the_error_is_measured_against_the_model_itself_where_float64_gives_nan() -> None:
    class Padded(nn.Module):
        """Language models mask so a query that sees no key."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.full_like(x, torch.finfo(x.dtype).min)
            return torch.softmax(hidden, dim=-1, dtype=torch.float32).to(x.dtype) + x

    oracle = Oracle(Padded().eval(), Inputs((torch.randn(2, 3),)))
    assert oracle.error(oracle.expected(), Promise.CLOSE) == 0
    assert all(trial.reference.values[0].isfinite().all() for trial in oracle.trials)


def test_an_input_that_the_original_refuses_is_not_asked_of_others() -> None:
    class One(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(2, 6)

    oracle = Oracle(One(), Inputs((torch.ones(4, 3),)))
    assert [trial.inputs.tensors[0].shape[0] for trial in oracle.trials] == [4, 4, 4]
    (told,) = oracle.uncompared(oracle.expected())
    assert re.fullmatch(r"another batch size: there the model itself raises RuntimeError at test_verify\.py:\d+", told)


def test_an_input_that_a_guard_refuses_is_told() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.shape[0] == 2 else x

    module, inputs = Two().eval(), Inputs((torch.ones(2, 3),))
    ledger = run_passes(capture(module, inputs), [Clean()], Oracle(module, inputs))
    assert ledger.uncompared == ("another batch size: there a guard of the capture does not hold",)


def test_a_model_that_gives_nan_is_refused_by_name() -> None:
    class Log(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.log()

    with pytest.raises(LoadError, match="the model itself gives NaN for the inputs 2 float32"):
        Oracle(Log(), Inputs((torch.tensor([-1.0, 1.0]),)))


def test_a_model_that_raises_is_refused_with_its_error() -> None:
    with pytest.raises(LoadError, match="the model itself raises RuntimeError for the inputs 1x5 float32") as caught:
        Oracle(nn.Linear(3, 3), Inputs((torch.ones(1, 5),)))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_model_that_needs_gradients_is_told_to_ask_for_them() -> None:
    class Slope(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.detach().requires_grad_()
            return torch.autograd.grad(x.pow(2).sum(), x)[0]

    inputs = Inputs((torch.ones(2),))
    with pytest.raises(LoadError, match=r"runs without gradients: compute them within `torch.enable_grad\(\)`"):
        Oracle(Slope().eval(), inputs)
    assert Oracle(Slope().train(), inputs).trials


def test_a_nan_that_a_rewrite_brings_breaks_every_promise_but_changes() -> None:
    oracle = Oracle(nn.Identity(), Inputs((torch.ones(2, 2),)))
    broken = [
        dataclasses.replace(outcome, values=tuple(value * math.nan for value in outcome.values))
        for outcome in oracle.expected()
        if outcome is not None
    ]
    difference = compare_outcomes(oracle.expected(), list(broken), Promise.CLOSE)
    assert difference.is_broken
    assert difference.what == "the output is NaN, infinite or 0 throughout in one of the two alone"


@pytest.mark.parametrize(("offset", "is_broken"), [(0.0, False), (1e-2, True), (NAN, True)])
def test_nothing_is_asked_where_the_original_gives_nan_for_random_inputs(offset: float, is_broken: bool) -> None:
    class Log(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.log()

    class Finite(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.log().nan_to_num(1.0) + offset

    inputs = torch.rand(64) + 0.1
    oracle = Oracle(Log(), Inputs((inputs,)))
    assert any(outcome is not None and outcome.values[0].isnan().any() for outcome in oracle.expected())
    found = oracle.outcomes(capture(Finite(), (inputs,)).module)
    assert compare_outcomes(oracle.expected(), found, Promise.CLOSE).is_broken is is_broken


@pytest.mark.parametrize("place", [0, (1 << 18) - 1, 1 << 18, 3 << 17, (1 << 19) + 4])
def test_relative_error_of_a_long_output_is_the_largest_anywhere(place: int) -> None:
    expected = torch.ones((1 << 19) + 5)
    expected[1], expected[-2] = float("inf"), 4.0
    found = expected.clone()
    found[place] += 0.5
    assert relative_error(expected, found) == 0.125
    found[place] = float("nan")
    assert relative_error(expected, found) == float("inf")


def test_relative_error_of_other_shapes_is_infinite() -> None:
    assert relative_error(torch.ones(2, 3), torch.zeros(3)) == float("inf")
    assert relative_error(torch.ones(0, 3), torch.zeros(2, 3)) == float("inf")


@pytest.mark.parametrize("wide", [torch.float64, torch.float32])
def test_a_mask_of_the_smallest_number_is_the_same_in_every_dtype(wide: torch.dtype) -> None:
    def masked(dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([torch.finfo(dtype).min, 1.0, 4.0], dtype=dtype)

    for narrow in (torch.float32, torch.float16, torch.bfloat16):
        found = masked(narrow)
        assert relative_error(masked(wide), found) == 0
        found[1] += 1
        assert relative_error(masked(wide), found) == 0.25


class Masked(nn.Module):
    """Logits, where the mask is filled as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.linear(x)
        return logits.masked_fill(x < 0, torch.finfo(logits.dtype).min)


def test_a_filled_mask_neither_hides_an_error_nor_is_one() -> None:
    model, inputs = Masked().eval(), Inputs.of(torch.tensor([[1.0, -1.0, 2.0]]))
    oracle, module = Oracle(model, inputs), capture(model, inputs).module
    assert oracle.error(oracle.outcomes(module), Promise.CLOSE) < 1e-6
    module.get_parameter("linear.bias").data.add_(0.1)
    outcomes = oracle.outcomes(module)
    assert oracle.error(outcomes, Promise.CLOSE) > 1e-2
    assert compare_outcomes(oracle.expected(), outcomes, Promise.CLOSE).is_broken


@pytest.mark.parametrize(("frozen_first", "what"), [(False, "is missing"), (True, "is new")])
def test_a_gradient_that_appears_or_goes_is_a_difference(frozen_first: bool, what: str) -> None:
    class Two(nn.Module):
        """Two layers, the second with or without a gradient of its input."""

        def __init__(self, cut: bool) -> None:
            super().__init__()
            self.first, self.second, self.cut = nn.Linear(3, 3), nn.Linear(3, 3), cut

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.first(x)
            return self.second(x.detach() if self.cut else x)

    torch.manual_seed(0)
    one, inputs = Two(frozen_first).train(), Inputs.of(torch.randn(2, 3))
    other = Two(not frozen_first).train()
    other.load_state_dict(one.state_dict())
    oracle = Oracle(one, inputs)
    found = compare_outcomes(oracle.expected(), oracle.outcomes(capture(other, inputs).module), Promise.CLOSE)
    assert found.is_broken and found.what == f"the gradient of 'first.weight' {what}"


def test_a_float64_output_that_becomes_float32_is_a_difference() -> None:
    model, inputs = nn.Linear(3, 3).double().eval(), Inputs.of(torch.randn(2, 3, dtype=torch.float64))
    oracle, module = Oracle(model, inputs), capture(nn.Sequential(model).eval(), inputs).module
    outcomes = [
        outcome and dataclasses.replace(outcome, values=tuple(value.float() for value in outcome.values))
        for outcome in oracle.outcomes(module)
    ]
    found = compare_outcomes(oracle.expected(), outcomes, Promise.CLOSE)
    assert found.is_broken and found.what == "the output is torch.float32 in place of torch.float64"


class Returns(nn.Module):
    """Adds to its buffer, and returns it."""

    def __init__(self, step: float) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3))
        self.step = step

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.total.add_(self.step * x)


def test_state_that_is_returned_is_compared_as_the_forward_left_it() -> None:
    inputs = Inputs.of(torch.ones(3))
    oracle, module = Oracle(Returns(1.0).eval(), inputs), capture(Returns(2.0).eval(), inputs).module
    found = compare_outcomes(oracle.expected(), oracle.outcomes(module), Promise.CLOSE)
    assert found.is_broken and found.error == pytest.approx(1.0)


class Spectrum(nn.Module):
    """Complex numbers of a real layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.fft.rfft(self.linear(x))


def test_complex_outputs_are_held_to_the_tolerance_of_their_parts() -> None:
    oracle = Oracle(Spectrum().eval(), Inputs.of(torch.randn(2, 6)))
    for factor, is_broken in ((1 + 1e-6j, False), (1 + 1e-3j, True)):
        found = [
            outcome and dataclasses.replace(outcome, values=tuple(value * factor for value in outcome.values))
            for outcome in oracle.expected()
        ]
        assert compare_outcomes(oracle.expected(), found, Promise.CLOSE).is_broken is is_broken
        assert oracle.error(found, Promise.CLOSE) == pytest.approx(abs(factor - 1), rel=0.5)
    assert compare_outcomes(oracle.expected(), found, Promise.EXACT).allowed == 0


def test_a_model_that_gives_a_complex_nan_is_refused_by_name() -> None:
    with pytest.raises(LoadError, match="the model itself gives NaN"):
        Oracle(Spectrum().eval(), Inputs.of(torch.full((2, 6), NAN)))


@pytest.mark.parametrize(("small", "is_broken"), [(1.02e-5, False), (1.5e-5, True)])
def test_a_small_gradient_is_held_to_the_rounding_of_the_largest(small: float, is_broken: bool) -> None:
    """That of a weight by channel before a batch norm is as small: it is a sum of large ones that cancel."""
    trainable = dict.fromkeys(("conv.weight", "scale.weight"), torch.Size([1]))
    before, after = (
        Outcome((), None, {"conv.weight": torch.ones(1), "scale.weight": torch.tensor([value])}, trainable)
        for value in (1e-5, small)
    )
    assert compare_outcomes([before], [after], Promise.CLOSE).is_broken is is_broken


@pytest.mark.parametrize(("value", "error"), [(b"a", 0.0), (b"b", math.inf)])
def test_values_without_a_hash_are_compared_with_those_of_a_float64_run(value, error):
    wide, narrow = (Outcome((bytearray(each),), None, {}, {}) for each in (b"a", value))
    assert difference_of(wide, narrow, Promise.CLOSE, widened=True).error == error


@pytest.mark.parametrize(
    ("expected", "found", "error"),
    [
        (math.inf, math.inf, 0.0),
        (math.nan, math.nan, 0.0),
        (math.inf, -math.inf, math.inf),
        (math.nan, 1.0, math.inf),
        (1.0, math.inf, math.inf),
        (2.0, 1.0, 0.5),
        (complex(math.nan, 1), complex(math.nan, 1), 0.0),
        (complex(1, math.nan), 1j, math.inf),
        (3 + 4j, 3 + 3j, 0.2),
    ],
)
def test_numbers_that_are_not_finite_differ_from_others_alone(expected: complex, found: complex, error: float) -> None:
    before, after = (Outcome((each,), None, {}, {}) for each in (expected, found))
    assert compare_outcomes([before], [after], Promise.CLOSE).error == error


class Arrays(nn.Module):
    """Gives an array of NumPy and one of its numbers beside a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))

    def forward(self, x: torch.Tensor) -> tuple[object, ...]:
        y = self.body(x)
        return y, y.detach().numpy(), y.detach().numpy().max()


def test_arrays_are_compared_as_tensors_are() -> None:
    model, x = Arrays().eval(), torch.randn(3, 4)
    result = fxopt.optimize(model, x, "fuse", devices=())
    assert result.ledger.changes
    executable = fxopt.lower(result.module, x)
    for found, expected in zip(executable(x), model(x), strict=True):
        assert type(found) is type(expected)
    before, after = (Outcome(tuple(apart([np.full(2, each)])), None, {}, {}) for each in (1.0, 1.5))
    assert compare_outcomes([before], [after], Promise.CLOSE).error == 0.5


@pytest.mark.parametrize(("value", "is_broken"), [(1.0, False), (2.0, True)])
def test_a_sparse_gradient_is_held_against_a_dense_one(value, is_broken):
    def outcome(gradient: torch.Tensor) -> Outcome:
        return Outcome((), None, {"table": gradient}, {"table": torch.Size((2, 2))})

    dense, sparse = torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, value]]).to_sparse()
    for pair in ((dense, sparse), (sparse, dense)):
        before, after = map(outcome, pair)
        assert compare_outcomes([before], [after], Promise.CLOSE).is_broken is is_broken


class Narrow(nn.Module):
    """Layers in fewer bits, by their parameters or by autocast, and what they give in float32."""

    def __init__(self, dtype: torch.dtype, autocast: bool) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.norm.running_var.fill_(3.0)
        self.dtype, self.autocast = dtype, autocast
        if not autocast:
            self.to(dtype)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, float, torch.Tensor]:
        with torch.autocast("cpu", self.dtype, enabled=self.autocast):
            y = self.norm(self.conv(x if self.autocast else x.to(self.dtype))).float()
        return y, 1.0, y > 1e9


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_float32_output_of_layers_in_fewer_bits_is_held_to_what_these_allow(
    dtype: torch.dtype, autocast: bool
) -> None:
    torch.manual_seed(0)
    model, x = Narrow(dtype, autocast).eval(), torch.randn(2, 3, 8, 8)
    result = fxopt.optimize(model, x, "fuse", devices=())
    assert [change.where for change in result.ledger.entries[0].changes] == ["norm"]
    expected = Oracle(model, Inputs.of(x)).expected()
    for factor, allowed in ((1 + 1e-3, TOLERANCE[dtype]), (1.2, TOLERANCE[dtype])):
        found = [
            outcome and dataclasses.replace(outcome, values=(outcome.values[0] * factor, *outcome.values[1:]))
            for outcome in Oracle(result.module, Inputs.of(x)).expected()
        ]
        difference = compare_outcomes(expected, found, Promise.CLOSE)
        assert difference.allowed == allowed and difference.is_broken is (factor == 1.2)


class Mixed(nn.Module):
    """Its product has no float64 form: its dtype is written out."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4).bfloat16())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.bfloat16() @ self.weight).float()


def test_a_run_that_may_fail_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(2, 4)
    module = capture(Mixed().eval(), (x,)).module
    with pytest.raises(RuntimeError, match="dtype"):
        module.double()(x.double())
    assert "Call using an FX-traced Module" in capsys.readouterr().err
    module = capture(Mixed().eval(), (x,)).module
    oracle = Oracle(module, Inputs((x,)))
    assert oracle.error(oracle.outcomes(module), Promise.EXACT) == 0
    assert capsys.readouterr().err == ""


class Shifts(nn.Module):
    """The gradient of its shift is next to nothing, as that of a bias before a batch norm."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.layer, self.shift = share, nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + self.share * self.shift


@pytest.mark.parametrize(("share", "agree"), [(-2e-12, True), (-2e-2, False)])
def test_float64_is_asked_for_what_the_own_dtype_can_tell_apart(share: float, agree: bool) -> None:
    module, other = Shifts(1e-12), Shifts(share)
    other.load_state_dict(module.state_dict())
    assert Oracle(module, Inputs((torch.randn(2, 4),))).agree_in_float64(module, other) is agree
