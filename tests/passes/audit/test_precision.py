"""The shadow run names the first operator that overflows, underflows, or loses too much."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxopt.findings import Severity, Subject
from fxopt.inputs import Inputs
from passes.audit import Audit
from passes.audit.evidence.precision import Loss, run_in_half


class Computes(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.function = function

    def forward(self, x):
        return self.function(self.fc(x))


def subject(function: Callable[[torch.Tensor], torch.Tensor]) -> Subject:
    torch.manual_seed(0)
    return Subject("x", Computes(function), Inputs((torch.randn(4, 8),)))


def first(function: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> Loss | None:
    return next((loss for loss in run_in_half(subject(function)) if loss.dtype is dtype), None)


def stagnates(x):
    total = torch.ones_like(x) * 4
    for _ in range(400):
        total = total + 1e-3
    return total - 4


def written_in_parts(x):
    whole = torch.zeros(4, 8)
    whole[:, :4] = x[:, :4]
    return whole.mul_(300).mul_(300)


def variance_of_large(x):
    shifted = x + 100
    return shifted.pow(2).mean(-1) - shifted.mean(-1).pow(2)


LOST = [
    (lambda x: (x * 1e4).pow(2), torch.float16, "overflow", "pow"),
    (lambda x: torch.exp(x * 20), torch.float16, "overflow", "exp"),
    (lambda x: (x * 1e-5).pow(2) * 1e5, torch.float16, "underflow", "pow"),
    (written_in_parts, torch.float16, "overflow", "mul"),
    (variance_of_large, torch.float16, "error", "sub"),
    (variance_of_large, torch.bfloat16, "error", "sub"),
    (stagnates, torch.float16, "error", "sub"),
    (lambda x: torch.sin(x * 1000), torch.bfloat16, "error", "sin"),
]


@pytest.mark.parametrize(("function", "dtype", "kind", "operator"), LOST)
def test_the_first_operator_is_named(function, dtype, kind, operator):
    loss = first(function, dtype)
    assert loss is not None
    assert (loss.slip.kind, loss.operator) == (kind, operator)
    assert loss.place is not None and loss.place.path == __file__


KEPT = {
    "softmax": lambda x: torch.softmax(x, -1),
    "cast to float32": lambda x: (x.float() * 1e4).pow(2).sum(-1).sqrt() / 1e5,
    "a mask of the lowest number": lambda x: x.masked_fill(x > 0, torch.finfo(x.dtype).min).softmax(-1),
    "a mask of minus infinity": lambda x: x.masked_fill(x > 0, -torch.inf).softmax(-1),
    "random numbers": lambda x: x * torch.rand(8),
    "a norm": lambda x: F.layer_norm(x, (8,)),
    "statistics beside the result": lambda x: F.layer_norm(x - x.mean(-1, keepdim=True), (8,)),
    "integers": lambda x: x[:, x.argmax(-1)] + (x > 0).sum(),
}


@pytest.mark.parametrize("name", KEPT)
def test_nothing_is_said_of_what_low_precision_holds(name):
    assert run_in_half(subject(KEPT[name])) == []


def test_what_is_made_of_an_overflow_is_not_told_of_again():
    losses = run_in_half(subject(lambda x: torch.where(x > 0, x, -9e15 * torch.ones_like(x)).softmax(-1)))
    assert [(loss.slip.kind, loss.operator) for loss in losses] == [("overflow", "mul")]


class Mixes(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.spectrum = nn.Parameter(torch.randn(9, 9, dtype=torch.complex64))
        self.experts = nn.Parameter(torch.randn(2, 16, 16))

    def forward(self, x):
        x = self.norm(self.fc(x.float()).float())
        x = torch.fft.irfft(torch.fft.rfft(x) @ self.spectrum, n=16)
        x = F.grouped_mm(x, self.experts, offs=torch.tensor([3, 8], dtype=torch.int32))
        return variance_of_large(self.norm(x))


def test_a_model_of_several_types_is_followed_to_its_end():
    torch.manual_seed(0)
    losses = run_in_half(Subject("x", Mixes(), Inputs((torch.randn(8, 16),))))
    assert {(loss.dtype, loss.slip.kind, loss.operator) for loss in losses} == {
        (torch.float16, "error", "sub"),
        (torch.bfloat16, "error", "sub"),
    }


def test_an_error_tells_what_came_in_and_whether_it_reaches_the_outputs():
    loss = first(variance_of_large, torch.float16)
    assert loss is not None
    assert loss.reaches
    assert loss.slip.given < 1e-2 < 0.1 < loss.slip.value
    hidden = first(lambda x: x + 1e-6 * variance_of_large(x)[:, None], torch.bfloat16)
    assert hidden is not None and not hidden.reaches


def test_the_finding_says_what_to_change():
    found = [each for each in Audit().inspect(subject(variance_of_large)).findings if each.rule == "FX305"]
    assert found[0].severity is Severity.WARNING
    assert "of operands that are off by 0.0%, and so are the outputs" in found[0].message
    assert "compute this part in float32" in found[0].advice


@pytest.mark.parametrize(("seen", "found"), [(0, False), (1, True)])
def test_nothing_is_said_of_small_numbers_before_batch_norms_have_seen_a_batch(seen, found):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(8)
            self.bn.num_batches_tracked.fill_(seen)

        def forward(self, x):
            return variance_of_large(self.bn(x))

    made = Subject("x", Normed(), Inputs((torch.randn(4, 8),)))
    assert ("FX305" in {finding.rule for finding in Audit().inspect(made).findings}) is found


def test_a_model_too_large_for_float64_is_a_note():
    with torch.device("meta"):
        module = nn.Linear(100_000, 6_000)
    result = Audit().inspect(Subject("x", module, Inputs((torch.randn(1, 100_000, device="meta"),))))
    assert any("too many to hold them in float64" in note for note in result.notes)
