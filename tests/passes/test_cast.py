"""cast: which values get fewer bits, which keep theirs, and what is promised of the error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt.capture import capture
from fxopt.errors import SpecError, VerifyError
from fxopt.graph import observe
from fxopt.relative_error import relative_error
from passes import Cast
from tests.models import STATIC
from tests.passes.programs import rewrite


def dtypes(module: Any, *inputs: torch.Tensor) -> dict[str, torch.dtype]:
    """Of the value of each node that computes something."""
    found: dict[str, torch.dtype] = {}

    def visit(_: Any, node: Any, value: Any) -> None:
        if isinstance(value, torch.Tensor) and node.target != "to" and node.op.startswith("call_"):
            found[node.name] = value.dtype

    with torch.no_grad():
        observe(module, inputs, {}, visit)
    return found


class ByHand(nn.Module):
    """A function of the input, a weight and a bias."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight, self.bias)


LOW = torch.bfloat16
WIDE = torch.float32
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[torch.dtype]]] = {
    "layers in a row": (lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (3, 8), [LOW, LOW]),
    "what compares follows": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 2)),
        (2, 3, 6, 6),
        [LOW, LOW, LOW, LOW, LOW],
    ),
    "what moves follows": (
        lambda: ByHand(lambda x, w, b: torch.permute(F.max_pool1d(F.linear(x, w, b), 2), (0, 2, 1)).flatten(1)),
        (2, 3, 8),
        [LOW, LOW, LOW, LOW],
    ),
    "what normalises stays": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Softmax(-1), nn.Linear(8, 8)),
        (3, 8),
        [LOW, WIDE, WIDE, LOW],
    ),
    "a batch norm stays": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
        (2, 3, 6, 6),
        [LOW, WIDE, WIDE],
    ),
    "a reduction stays": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1)),
        (2, 3, 6, 6),
        [LOW, WIDE],
    ),
    "a function of parameters": (lambda: ByHand(lambda x, w, b: F.linear(x, w, b).softmax(-1)), (3, 8), [LOW, WIDE]),
    "a product with a parameter": (lambda: ByHand(lambda x, w, b: x @ w + b), (3, 8), [LOW, WIDE]),
    "a sum of a product": (lambda: ByHand(lambda x, w, b: torch.addmm(b, x, w)), (3, 8), [LOW]),
    "a convolution by a computed weight": (
        lambda: ByHand(lambda x, w, b: F.conv1d(x, (w / w.norm()).unsqueeze(-1), b)),
        (3, 8, 4),
        [WIDE, WIDE, WIDE, LOW],
    ),
    "a convolution of as many groups as examples, by a weight of each": (
        lambda: ByHand(lambda x, w, b: F.conv1d(x.view(1, -1, 4), w.repeat(len(x), 1).unsqueeze(-1), groups=len(x))),
        (3, 8, 4),
        [WIDE, WIDE, WIDE, LOW],
    ),
    "in place stays": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8)),
        (3, 8),
        [LOW, WIDE, LOW],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_which_values_get_fewer_bits(name: str) -> None:
    torch.manual_seed(0)
    factory, shape, expected = MODELS[name]
    model, x = factory().eval(), torch.randn(*shape)
    outcome = rewrite(Cast(), capture(model, (x,)).module)
    assert list(dtypes(outcome.module, x).values()) == expected
    with torch.no_grad():
        y, reference = outcome.module(x), model(x)
    assert y.dtype is torch.float32
    assert 0 < relative_error(reference, y) < 2e-2
    assert list(outcome.module.state_dict()) == list(model.state_dict())


class Written(nn.Module):
    """A cast value that is written in place between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.one(x)
        z = self.two(y)
        y += z
        return self.three(y)


class Attends(nn.Module):
    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v) + (q @ k.transpose(-1, -2)) @ v


def test_a_value_that_is_written_is_cast_anew() -> None:
    torch.manual_seed(0)
    model, x = Written().eval(), torch.randn(3, 8)
    outcome = rewrite(Cast(), capture(model, (x,)).module)
    with torch.no_grad():
        assert 0 < relative_error(model(x), outcome.module(x)) < 2e-2


class WrittenThroughViews(nn.Module):
    """What is written into a view shows in what it views, and the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, z = self.one(x), self.two(x)
        y.view(-1).add_(1)
        turned = z.transpose(0, 1)
        z.mul_(3)
        return y, turned


def test_views_of_what_is_written_share_its_memory() -> None:
    torch.manual_seed(0)
    model, x = WrittenThroughViews().eval(), torch.randn(3, 8)
    outcome = rewrite(Cast(), capture(model, (x,)).module)
    with torch.no_grad():
        for expected, found in zip(model(x), outcome.module(x), strict=True):
            assert 0 < relative_error(expected, found) < 2e-2


def test_products_are_computed_in_fewer_bits() -> None:
    torch.manual_seed(0)
    inputs = tuple(torch.randn(2, 3, 5, 8) for _ in range(3))
    outcome = rewrite(Cast(), capture(Attends().eval(), inputs).module)
    assert len(outcome.changes) == 3
    assert relative_error(Attends()(*inputs), outcome.module(*inputs)) < 3e-2


MASKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "booleans": lambda seen: seen,
    "the smallest number": lambda seen: (~seen).float() * torch.finfo(WIDE).min,
    "infinity": lambda seen: torch.zeros(seen.shape).masked_fill(~seen, -torch.inf),
}


class AttendsMasked(nn.Module):
    def __init__(self, mask: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.project = nn.Linear(8, 8)
        self.mask = mask

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        x, mask = self.project(x), self.mask(seen)
        return F.scaled_dot_product_attention(F.scaled_dot_product_attention(x, x, x, mask), x, x, attn_mask=mask)


@pytest.mark.parametrize("name", MASKS)
def test_masks_hide_what_they_hid(name: str) -> None:
    torch.manual_seed(0)
    model, x = AttendsMasked(MASKS[name]).eval(), torch.randn(2, 3, 5, 8)
    seen = torch.ones(5, 5, dtype=torch.bool).tril()
    outcome = rewrite(Cast(), capture(model, (x, seen)).module)
    assert len(outcome.changes) == 3
    seen[2] = False  # a query all of whose keys are masked, as of padding
    with torch.no_grad():
        assert 0 < relative_error(model(x, seen), outcome.module(x, seen)) < 2e-2


class Tied(nn.Module):
    """A table that is the weight of the last layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(10, 8), nn.Linear(8, 10)
        self.last.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.last(self.table(ids))


def test_a_tied_table_keeps_its_bits() -> None:
    torch.manual_seed(0)
    model, ids = Tied().eval(), torch.arange(10)
    outcome = rewrite(Cast(), capture(model, (ids,)).module)
    assert dtypes(outcome.module, ids) == {"table": WIDE, "last": LOW}
    assert torch.equal(outcome.module.table(ids), model.table(ids))  # type: ignore[operator]
    with torch.no_grad():
        assert 0 < relative_error(model(ids), outcome.module(ids)) < 2e-2


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.fc(x))


class ReadsWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + self.fc.weight.sum()


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda _, inputs, output: output * 2)
    return module


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "twice": (lambda: Twice().eval(), "at more than one place"),
    "a parameter twice": (lambda: ByHand(lambda x, w, b: F.linear(x @ w, w)).eval(), "read at more than one place"),
    "its weight is read": (lambda: ReadsWeight().eval(), "its parameters are read out of it"),
    "a hook": (lambda: nn.Sequential(hooked(nn.Linear(8, 8))).eval(), "it has a forward hook"),
    "a computed weight in training": (
        lambda: ByHand(lambda x, w, b: F.linear(x, w / w.norm())).train(),
        "its weight or bias is computed",
    ),
    "training": (lambda: nn.Sequential(nn.Linear(8, 8)).train(), "torch.autocast is for that"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_stays_says_why(name: str) -> None:
    factory, reason = REFUSED[name]
    outcome = rewrite(Cast(), capture(factory(), (torch.randn(3, 8),)).module)
    assert not outcome.changes
    assert reason in outcome.skips[0].reason


def test_batch_norms_are_folded_first_and_the_error_is_told() -> None:
    case = STATIC["staged_cnn"]
    result = fxopt.optimize(case.build(), case.example(), "clean,fuse,cast", devices=())
    entry = result.ledger.entries[-1]
    assert entry.relative_error is not None
    assert 1e-6 < entry.relative_error < 5e-2
    assert all(value.dtype is torch.bfloat16 for value in result.module.parameters())


def test_the_error_is_a_promise_where_one_is_given() -> None:
    case = STATIC["simple_net"]
    fxopt.optimize(case.build(), case.example(), "cast{max_error=0.5}", devices=())
    with pytest.raises(VerifyError, match=r"cast: the outputs differ from the original by .* \(allowed 1e-06\)"):
        fxopt.optimize(case.build(), case.example(), "cast{max_error=1e-6}", devices=())


@pytest.mark.parametrize(("flags", "said"), [(("avx2",), True), (("avx2", "amx_bf16"), False)])
def test_a_slow_cpu_is_told(flags: tuple[str, ...], said: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    found = dataclasses.replace(fxopt.bench.fingerprint(), cpu_flags=flags)
    monkeypatch.setattr(fxopt.bench, "fingerprint", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = rewrite(Cast(), capture(nn.Sequential(nn.Linear(3, 2)).eval(), (torch.randn(2, 3),)).module)
    assert any("no instructions for bf16" in skip.reason for skip in outcome.skips) is said


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int8"}, "bf16 or fp16"),
        ({"max_error": -1.0}, "0 or more"),
        ({"max_error": float("nan")}, "0 or more"),
    ],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Cast(**options)


class NoisyInTraining(nn.Module):
    """The two modes take different paths, so that each has a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            x = x + torch.randn_like(x)
        return self.fc(x)


def test_layers_that_the_graphs_of_both_modes_call_are_cast_and_training_takes_that_path_too() -> None:
    outcome = rewrite(Cast(), capture(NoisyInTraining().eval(), (torch.randn(3, 8),)).module)
    assert [change.what for change in outcome.changes] == [
        "runs in both modes from now on, with its layers cast",
        "computed in bfloat16",
    ]
    assert list(outcome.module.graphs) == [None]
    outcome = rewrite(Cast(), capture(NoisyInTraining().train(), (torch.randn(3, 8),)).module)
    assert outcome.changes == []
