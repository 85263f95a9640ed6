"""A captured module takes other sizes where the original does; where the user decided on a size, a guard says so."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import itertools
import logging
import math
import pickle
import subprocess
import sys
from math import log2
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn, sym_min
from torch.distributions import AffineTransform, MultivariateNormal, Normal
from torch.distributions import TransformedDistribution as Affine

from fxopt.capture import capture
from fxopt.errors import GuardError
from tests.capture.agree import assert_same, step


class Sizes(nn.Module):
    """Convolutions over any image, attention over any sequence: nothing is decided on a size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.query = nn.Linear(8, 8)

    def forward(self, x):
        batch, _, height, width = x.shape
        y = self.bn(self.conv(x))
        rows = y.flatten(2).transpose(1, 2)
        heads = self.query(rows).view(batch, rows.size(1), 2, 4).transpose(1, 2)
        mask = torch.ones(rows.shape[1], rows.shape[1], dtype=torch.bool).tril()
        positions = torch.arange(rows.shape[1]).float() / (height * width)
        y = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=mask)
        y = y.transpose(1, 2).reshape(batch, -1, 8) + positions[:, None]
        return y.mean(1), F.interpolate(x, (height // 2, width // 2)).sum((2, 3))


class Decides(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x, flag: bool = False):
        y = self.bn(self.fc(x))
        if x.shape[0] > 4:
            return y * 2
        for _ in range(x.shape[1] // 4):
            y = y + 1
        return -y if flag else y


@pytest.mark.parametrize("training", [False, True])
def test_other_batch_sizes_sequence_lengths_and_image_sizes(training):
    torch.manual_seed(0)
    module = Sizes().train(training)
    captured = capture(module, (torch.randn(2, 3, 12, 12),))
    assert captured.opaque == ()
    assert captured.guards == ()
    for size in ((1, 3, 12, 12), (5, 3, 12, 12), (2, 3, 20, 20), (3, 3, 7, 9), (2, 3, 33, 12)):
        x = torch.randn(size)
        assert_same(step(module, (x,), {}), step(captured.module, (x,), {}))


class Converts(nn.Module):
    """Makes Python numbers of sizes, of a buffer and of a mean, as window_reverse of Swin and many others do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("place", torch.tensor([1]))

    def forward(self, x):
        batch = int(x.shape[0] * x.shape[1] / (2 * 2) * 4 / x.shape[1])
        side = int(math.sqrt(x.shape[1]))
        half = int(x.size(0) / 2)
        capacity = int(1.25 * float(x.size(0)))
        y = x.view(batch, side, side) * float(x.detach().mean()) / float(batch)
        return y, x[:half], torch.ones(capacity), int(self.place) + side, isinstance(half, int)


def test_numbers_that_are_made_of_sizes_are_recorded():
    module = Converts()
    captured = capture(module, (torch.randn(4, 16),))
    assert captured.opaque == captured.guards == ()
    assert not any(node.target is math.sqrt and not node.users for node in captured.module.graph.nodes)
    duplicate = pickle.loads(pickle.dumps(captured.module))
    again = capture(captured.module, (torch.randn(4, 16),))
    assert again.guards == ()
    for size in ((4, 16), (6, 16), (2, 25), (7, 36)):
        x = torch.randn(size)
        for made in (captured.module, duplicate, again.module):
            assert_same(step(module, (x,), {}), step(made, (x,), {}))


def test_a_guard_names_the_line_that_decided():
    lines = Path(__file__).read_text().splitlines()
    line = next(n for n, text in enumerate(lines, 1) if text.strip() == "if x.shape[0] > 4:")
    captured = capture(Decides().eval(), (torch.randn(2, 4),))
    assert any(g.assumption == "x.shape[0] <= 4" and g.location == f"test_sizes.py:{line}" for g in captured.guards)
    with pytest.raises(GuardError, match=rf"x\.shape\[0\] <= 4 \(test_sizes\.py:{line}\), but it is 5 here"):
        captured.module(torch.randn(5, 4))
    assert captured.module(torch.randn(4, 4)).shape == (4, 4)


def test_guards_outlast_a_symbolic_trace():
    again = torch.fx.symbolic_trace(capture(Decides().eval(), (torch.randn(2, 4),)).module, {"flag": False})
    assert again(torch.randn(4, 4)).shape == (4, 4)
    with pytest.raises(GuardError, match="x has 2 dimensions"):
        again(torch.randn(2, 2, 4))
    with pytest.raises(GuardError, match=r"x\.shape\[0\] <= 4"):
        again(torch.randn(5, 4))


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((torch.randn(2, 4),), {"flag": True}, "flag is False"),
        ((torch.randn(2, 2, 4),), {}, "x has 2 dimensions"),
        (("text",), {}, "x is a tensor"),
    ],
)
def test_inputs_of_another_kind_are_refused(args, kwargs, said):
    captured = capture(Decides().eval(), (torch.randn(2, 4),)).module
    with pytest.raises(GuardError, match=said):
        captured(*args, **kwargs)


class Adds(nn.Module):
    """Python unrolls what it iterates over."""

    def forward(self, parts):
        if isinstance(parts, dict):
            parts = list(parts.values())
        return sum(self(part) if isinstance(part, list) else part * 2 for part in parts)


@pytest.mark.parametrize(
    ("given", "other", "said"),
    [
        ([torch.ones(2)] * 2, [torch.ones(2)] * 3, "parts has 2 items .* 3 here"),
        ((torch.ones(2),) * 2, (torch.ones(2),), "parts has 2 items .* 1 here"),
        ({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)}, r"parts has the keys \['a'\]"),
        ([[torch.ones(2)]], [[torch.ones(2), torch.ones(2)]], r"parts\[0\] has 1 items"),
    ],
)
def test_inputs_with_more_or_fewer_items_are_refused(given, other, said):
    captured = capture(Adds(), (given,))
    with pytest.raises(GuardError, match=said):
        captured.module(other)


class Calls(nn.Module):
    """Calls a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


ALWAYS = {
    "cancelled": lambda x, n: x * 2 if (n + 0) - n <= 0 else x,
    "larger by one": lambda x, n: x * 2 if n + 1 > n else x,
    "twice less once": lambda x, n: x * 2 if 2 * n - n == n else x,
    "negated": lambda x, n: x.expand(3 + (-n + n), *x.shape),
    "multiplied up": lambda x, n: x.reshape(math.prod(x.shape)),
    "rounded": lambda x, n: x * math.ceil(n / 2),
    "of what values size": lambda x, n: x * 2 if (m := x[x > 0].shape[0]) + 2 - m == 2 else x,
}


@pytest.mark.parametrize("name", ALWAYS)
def test_what_holds_for_all_sizes_needs_no_guard(name):
    module = Calls(lambda x: ALWAYS[name](x, x.shape[0]))
    captured = capture(module, (torch.randn(2, 4),))
    assert not captured.guards
    assert not captured.opaque
    x = torch.randn(5, 4)
    assert torch.equal(captured.module(x), module(x))


@pytest.mark.parametrize(
    "decides", [lambda n: n + n > 3, lambda n: n * n >= n, lambda n: 3 - n == 1, lambda n: n * 1.0 > n - 1]
)
def test_what_holds_for_some_sizes_is_guarded(decides):
    assert len(capture(Calls(lambda x: x * 2 if decides(x.shape[0]) else x), (torch.randn(2, 4),)).guards) == 1


TAKEN_APART = {
    "iteration": (lambda x: sum(row * 2 for row in x), "2 parts by iteration"),
    "zip": (lambda x: sum(a + b for a, b in zip(x, x, strict=True)), "2 parts by iteration"),
    "iteration over what was made": (lambda x: sum(a * 1.0 for a in torch.ones(x.shape[0], 4)), "2 parts by iteration"),
    "unbind": (lambda x: sum(x.unbind(dim=0)), "2 parts by iteration or 'unbind'"),
    "split": (lambda x: sum(part.sum() for part in x.split(1)), "2 parts by 'split'"),
    "chunk": (lambda x: sum(part.sum() for part in torch.chunk(input=x, chunks=4)), "2 parts by 'chunk'"),
    "unpacked": (lambda x: (lambda a, b: a + b)(*x), "x.shape\\[0\\] == 2|2 parts"),
}


@pytest.mark.parametrize("name", TAKEN_APART)
def test_as_many_parts_as_a_size_makes_are_guarded(name):
    function, said = TAKEN_APART[name]
    module = Calls(function)
    captured = capture(module, (torch.randn(2, 3, 4),)).module
    x = torch.randn(2, 3, 4)
    assert torch.equal(captured(x), module(x))
    with pytest.raises(GuardError, match=rf"{said}.*test_sizes.py:\d+.* 3 here"):
        captured(torch.randn(3, 3, 4))


SEEN = {
    "numbers of a tensor": lambda x: x * len(torch.arange(x.shape[0]).tolist()),
    "rank after squeeze": lambda x: x * x.squeeze().dim(),
    "shape after squeeze": lambda x: x * len(x.squeeze(dim=0).shape),
    "sameness": lambda x: x * 2 if x.is_same_size(torch.ones(2, x.shape[1])) else x,
    "text": lambda x: x * {"2": 5}.get(str(x.shape[0]), 7),
    "formatted": lambda x: x * {"n2": 5}.get(f"n{x.shape[0]}", 7),
    "bits": lambda x: x * x.shape[0].bit_length(),
    "bits as text": lambda x: x * bin(x.shape[0]).count("0"),
    "item of a list": lambda x: x * [5, 6, 7, 8][x.shape[0]],
    "part of a list": lambda x: x * len([5, 6, 7, 8][: x.shape[0]]),
    "part of an iterator": lambda x: x * len(list(itertools.islice(range(9), x.shape[0]))),
    "count from a size": lambda x: x * next(index for index, _ in enumerate("a", start=x.shape[0])),
    "complex number": lambda x: x * (1j * x.shape[0]).imag,
    "array of numpy": lambda x: x * float(np.sqrt(x.shape[0])),
    "whether a ratio is whole": lambda x: x * 2 if (x.shape[0] / 2).is_integer() else x,
    "sum of ratios": lambda x: x * math.fsum(size / 4 for size in x.shape[:1]),
    "question with an option": lambda x: x * 2 if math.isclose(x.shape[0] / 4, 0.5, abs_tol=x.shape[0] / 100) else x,
}


@pytest.mark.parametrize("name", SEEN)
def test_what_python_reads_of_sizes_is_guarded(name):
    module = Calls(SEEN[name])
    captured = capture(module, (torch.randn(2, 3),)).module
    x = torch.randn(2, 4)
    assert torch.equal(captured(x), module(x))
    with pytest.raises(GuardError, match=r"test_sizes\.py"):
        captured(torch.randn(1, 3))


class Table(dict):
    check = dict.get


def debug_print(*texts):
    """Tells nothing, by a name that says it does."""


KEYS = {
    "a name that tells of no message": lambda x: x * Table(n2=5).check(f"n{x.shape[0]}", 7),
    "what is looked up within a message": lambda x: x * (debug_print({"n2": 5}[f"n{x.shape[0]}"]) or 2),
}


@pytest.mark.parametrize("name", KEYS)
def test_a_text_that_may_be_a_key_is_guarded(name):
    captured = capture(Calls(KEYS[name]), (torch.randn(2, 3),)).module
    with pytest.raises(GuardError, match=r"x\.shape\[0\] == 2 \(test_sizes\.py"):
        captured(torch.randn(1, 3))


MESSAGES = {
    "an assertion of torch": lambda x: torch._assert(x.dim() == 2, f"expected rows, got {x.shape}"),
    "its message by name": lambda x: torch._assert(condition=x.dim() == 2, message=f"got {x.shape[0]}"),
    "several lines": lambda x: torch._assert(
        x.dim() == 2,
        "expected rows of numbers, one for each, "
        f"but there are {x.shape[0]} of {len(x)}",
    ),
    "a sum": lambda x: torch._assert(x.dim() == 2, "got " + str(x.shape[0]) + " rows"),
    "a print": lambda x: debug_print(f"{x.shape[0]:3d}", " ".join(["of", str(x.shape[0])])),
    "a print of the sizes themselves": lambda x: print("rows:", x.shape[0], x.shape),  # noqa: T201
    "a log": lambda x: logging.getLogger("test").info("rows: %d", x.shape[0]),
    "a log that is written": lambda x: logging.getLogger("test").error("rows: %s of %s", x.shape[0], x.shape),
}  # fmt: skip


@pytest.mark.parametrize("name", MESSAGES)
def test_what_a_message_tells_of_a_size_is_no_guard(name):
    module = Calls(lambda x: (MESSAGES[name](x), x * 2)[1])
    captured = capture(module, (torch.randn(2, 3),))
    assert captured.guards == () and captured.opaque == ()
    x = torch.randn(1, 4)
    assert torch.equal(captured.module(x), module(x))


class WithLengths(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, lengths):
        return self.function(x, lengths, lengths.max().item())


RECORDED = {
    "mask": lambda x, lengths, n: torch.arange(n)[None] < lengths[:, None],
    "mask by int": lambda x, lengths, n: torch.arange(int(lengths.max()))[None] < lengths[:, None],
    "trimmed": lambda x, lengths, n: x[:, :n],
    "picked": lambda x, lengths, n: x[:, n] * 2,
    "padded": lambda x, lengths, n: F.pad(x, (0, 0, 0, 8 - n)),
    "summed by groups": lambda x, lengths, n: torch.zeros(n + 1, 3).index_add(0, lengths, x[:, 0]),
    "rounded": lambda x, lengths, n: x[:, : round(lengths.float().mean().item())],
    "square": lambda x, lengths, n: torch.ones(n, n).tril() + torch.eye(n),
}
DECIDES = {
    "item of a list": lambda x, lengths, n: x * [5, 6, 7, 8, 9][n],
    "item of a list, rounded": lambda x, lengths, n: x * [5, 6, 7, 8, 9][math.floor(n * 0.5)],
    "part of a list": lambda x, lengths, n: x * len([5, 6, 7, 8, 9][:n]),
    "range": lambda x, lengths, n: sum(x * i for i in range(n)),
    "repetition": lambda x, lengths, n: x * len([0] * n),
    "text": lambda x, lengths, n: x * {"n3": 5}.get(f"n{n}", 7),
    "array": lambda x, lengths, n: torch.from_numpy(np.ones(n, "float32")),
    "size of what was made": lambda x, lengths, n: x * 2 if torch.ones(n).shape[0] == 3 else x,
    "rows": lambda x, lengths, n: sum(index * row for index, row in enumerate(torch.ones(n, 3))),
    "rank": lambda x, lengths, n: x[:, :n].squeeze(1) * 2,
    "list": lambda x, lengths, n: torch.stack([row[k] for row, k in zip(x, lengths.tolist(), strict=True)]),
    "list of as many": lambda x, lengths, n: x * len(lengths.nonzero().tolist()),
}


@pytest.mark.parametrize("name", [*RECORDED, *DECIDES])
def test_integers_that_depend_on_values_are_recorded_where_python_does_not_read_them(name):
    module = WithLengths({**RECORDED, **DECIDES}[name])
    captured = capture(module, (torch.randn(2, 5, 3), torch.tensor([3, 1])))
    assert bool(captured.opaque) is (name in DECIDES)
    for lengths in ([3, 1], [1, 1], [2, 4], [4, 2, 3], [2]):
        args = torch.randn(len(lengths), 5, 3), torch.tensor(lengths)
        assert torch.equal(captured.module(*args), module(*args))


MATH = {
    "divisor": lambda x: x * math.gcd(x.shape[0], 6),
    "root": lambda x: x * math.isqrt(4 * x.shape[0]),
    "logarithm": lambda x: x * math.log(x.shape[0]),
    "logarithm by another name": lambda x: x * log2(x.shape[0]),
    "power of a ratio": lambda x: x * math.exp(x.shape[0] / 4),
    "power of a value": lambda x: x * math.exp(x.max().item()),
    "logarithm of a value": lambda x: x * log2(abs(x.max().item())),
    "length of a value": lambda x: x * math.hypot(3.0, x.max().item()),
}


@pytest.mark.parametrize("name", MATH)
def test_what_math_computes_is_recorded(name):
    module = Calls(MATH[name])
    captured = capture(module, (torch.randn(2, 3),))
    assert captured.guards == captured.opaque == ()
    for rows in (1, 2, 5):
        x = torch.randn(rows, 3)
        assert torch.equal(captured.module(x), module(x))


ON_THE_RIGHT = {
    "quotient": lambda x: x * (1.0 / x.shape[0]),
    "product": lambda x: x[: math.floor(0.5 * x.shape[0])],
    "difference": lambda x: x * (0.5 - x.shape[0]),
    "power": lambda x: x * 0.5 ** x.shape[0],
    "quotient and remainder": lambda x: x * divmod(7, x.shape[0])[0] + divmod(7.5, x.shape[0])[1],
    "number of elements": lambda x: x / x.shape.numel() + x.size()[1:].numel() + (x.shape[:1] * 2).numel(),
    "number of bytes": lambda x: x / x.nbytes,
    "number of elements of a longer shape": lambda x: x / (x.shape + (4,)).numel() + ((4,) + x.shape).numel(),  # noqa: RUF005
}


@pytest.mark.parametrize("name", ON_THE_RIGHT)
def test_numbers_made_of_a_plain_number_and_a_size_go_on(name):
    module = Calls(ON_THE_RIGHT[name])
    captured = capture(module, (torch.randn(2, 3),))
    assert captured.opaque == ()
    assert captured.guards == ()
    x = torch.randn(4, 3)
    assert torch.equal(captured.module(x), module(x))


OF_TORCH = {
    "the larger of a size and a number": lambda x: x.new_ones(torch.sym_max(x.shape[0], 3)),
    "the smaller of them, by another name": lambda x: x[: sym_min(2, x.shape[0])],
    "a whole number of a quotient": lambda x: x * torch.sym_int(x.shape[0] / 2),
    "a float and a root": lambda x: x * torch.sym_float(x.shape[0]) + float(x.shape[0]) + torch.sym_sqrt(x.shape[0]),
    "the shape of a sum": lambda x: x[:, None].expand(torch.broadcast_shapes((x.shape[0], 1, 1), x.shape)),
    "of numbers and lists": lambda x: x.new_ones(torch.functional.broadcast_shapes(3, [x.shape[0], 1])),
    "the density of a distribution that is shifted": lambda x: Affine(
        Normal(x, 1.0), AffineTransform(0.5, 2.0)
    ).log_prob(x),
    "the density of one of many variables": lambda x: MultivariateNormal(x, torch.eye(3)).log_prob(x + 1),
}


@pytest.mark.parametrize("name", OF_TORCH)
def test_what_python_code_of_torch_computes_of_sizes_is_recorded(name):
    module = Calls(OF_TORCH[name])
    captured = capture(module, (torch.randn(2, 3),))
    assert captured.opaque == ()
    for rows in (1, 2, 5):
        x = torch.randn(rows, 3)
        assert torch.equal(copy.deepcopy(captured.module)(x), module(x))


def test_what_a_message_tells_of_a_value_is_told_at_each_call(capsys):
    module = Calls(lambda x: (print(f"{x.max().item():.1f}"), x * 2)[1])  # noqa: T201
    captured = capture(module, (torch.ones(2),)).module
    capsys.readouterr()
    captured(torch.full((2,), 3.0))
    assert capsys.readouterr().out == "3.0\n"


def remembers(function):
    """A decorator of a library, which keeps the cache where only its own function finds it."""
    cached = functools.lru_cache(maxsize=1)(function)

    @functools.wraps(function)
    def call(*args):
        return cached(*args)

    return call


@functools.lru_cache
def ramp(rows, columns):
    return torch.arange(rows * columns).view(rows, columns)


@remembers
def ramp_of(shape):
    return torch.arange(shape.numel()).view(shape)


class Remembers(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    @functools.cache  # noqa: B019  as people write it
    def method(self, rows):
        return torch.arange(rows)

    @staticmethod
    @functools.lru_cache(maxsize=2)
    def static(rows):
        return torch.arange(rows)

    def forward(self, x):
        if self.kind == "function":
            return x + ramp(*x.shape)
        if self.kind == "decorator":
            return x + ramp_of(x.shape)
        return x + getattr(self, self.kind)(x.shape[0])[:, None]


@pytest.mark.parametrize("kind", ["function", "decorator", "method", "static"])
def test_what_functools_caches_by_a_size_takes_other_sizes(kind):
    module = Remembers(kind)
    module(torch.randn(2, 3))
    before = {owner: {**vars(owner)} for owner in (Remembers, sys.modules[__name__])}
    captured = capture(module, (torch.randn(2, 3),))
    assert {owner: {**vars(owner)} for owner in before} == before
    assert (captured.guards, captured.opaque) == ((), ())
    for shape in ((2, 3), (5, 4)):
        x = torch.randn(shape)
        assert torch.equal(captured.module(x), module(x))


def test_what_functools_caches_by_a_plain_number_stays_cached():
    ramp.cache_clear()
    module = Calls(lambda x: x + ramp(2, 3))
    capture(module, (torch.randn(2, 3),))
    module(torch.randn(2, 3))
    assert ramp.cache_info().misses == 1


def test_a_shape_is_one_of_torch_to_the_code_that_reads_it():
    def reads(x):
        assert isinstance(x.shape, torch.Size)
        assert isinstance(x.shape[0], int)
        assert (x.shape[-1:], x.shape) == (torch.Size([3]), torch.Size([*x.shape]))
        return x.reshape(torch.Size([1]) + x.shape)

    module = Calls(reads)
    captured = capture(module, (torch.randn(2, 3),))
    assert captured.opaque == ()
    x = torch.randn(2, 3)
    assert torch.equal(captured.module(x), module(x))


def test_numbers_of_sizes_go_on():
    module = Calls(lambda x: x * x.shape[0].real + x.shape[0].conjugate())
    captured = capture(module, (torch.randn(2, 3),)).module
    x = torch.randn(5, 3)
    assert torch.equal(captured(x), module(x))


def test_dimensions_that_values_size_are_opaque_unless_they_are_the_last():
    rows = capture(Calls(lambda x: x * x.nonzero()[:, :1].squeeze().dim()), (torch.eye(2),))
    assert "takes dimensions away ('squeeze') whose size depends on the values" in rows.opaque[0].reason
    assert torch.equal(rows.module(torch.diag(torch.tensor([1.0, 0.0]))), torch.zeros(2, 2))
    assert not capture(Calls(lambda x: x.nonzero()[:, :1].squeeze(-1)), (torch.eye(2),)).opaque


def test_parts_of_fixed_number_leave_sizes_free():
    module = Calls(lambda x: sum(part.relu() for part in (x * x.shape[0]).chunk(2, dim=-1)))
    captured = capture(module, (torch.randn(2, 4),)).module
    for size in (1, 2, 5):
        x = torch.randn(size, 4)
        assert torch.equal(captured(x), module(x))


def test_parts_of_what_values_size_are_opaque_but_not_those_of_its_features():
    rows = capture(Calls(lambda x: sum(row.sum() for row in x[x[:, 0] > 0])), (torch.eye(3),))
    assert "takes a tensor apart ('unbind') whose size depends on the values" in rows.opaque[0].reason
    assert torch.equal(rows.module(torch.ones(3, 3)), torch.tensor(9.0))
    features = capture(Calls(lambda x: sum(x[x[:, 0] > 0].chunk(2, dim=-1))), (torch.eye(4),))
    assert not features.opaque
    assert features.module(torch.ones(4, 4)).shape == (4, 2)


class Picks(nn.Module):
    """Gives as many parts as there are positive values: opaque."""

    def forward(self, x):
        return [row * 2 for row in x.tolist() if row > 0]


class Adding(nn.Module):
    """Adds up what an opaque module gives."""

    def __init__(self):
        super().__init__()
        self.picks = Picks()

    def forward(self, x):
        return x.sum() + sum(self.picks(x.long()))


def test_another_structure_of_what_an_opaque_module_gives_is_refused():
    captured = capture(Adding(), (torch.tensor([1.0, -1.0]),))
    assert [part.path for part in captured.opaque] == ["picks"]
    assert captured.module(torch.tensor([3.0, -1.0])) == 2 + 6
    with pytest.raises(GuardError, match="the structure of what 'picks' gives"):
        captured.module(torch.tensor([1.0, 1.0]))


@pytest.mark.parametrize("training", [False, True])
def test_recapture_keeps_both(training):
    torch.manual_seed(0)
    module = Decides().train(training)
    captured = capture(copy.deepcopy(module), (torch.randn(2, 4),), on_guard_failure="recapture").module
    for size in (2, 8, 3, 6):
        x = torch.randn(size, 4)
        assert_same(step(module, (x,), {}), step(captured, (x,), {}))
    assert_same(module(torch.ones(2, 4), flag=True), captured(torch.ones(2, 4), flag=True))
    assert len(captured.captures) == 3
    assert list(captured.state_dict()) == list(module.state_dict())
    module.train(not training)
    captured.train(not training)
    for size in (2, 8):
        x = torch.randn(size, 4)
        assert_same(step(module, (x,), {}), step(captured, (x,), {}))


def test_all_captures_share_the_parameters():
    module = Decides().eval()
    captured = capture(module, (torch.randn(2, 4),), on_guard_failure="recapture").module
    small, large = torch.randn(2, 4), torch.randn(8, 4)
    captured(large)
    assert len(list(captured.parameters())) == len(list(module.parameters()))
    torch.manual_seed(3)
    other = Decides().eval()
    captured.load_state_dict(other.state_dict())
    assert_same((other(small), other(large)), (captured(small), captured(large)))
    assert_same(other.double()(large.double()), captured.double()(large.double()))


class Grown(Decides):
    """Has a method that calls the module at two sizes, as generating text does."""

    def grown(self, x):
        return self(torch.cat([self(x)] * 4))


def test_a_method_of_the_original_recaptures():
    module = Grown().eval()
    module.register_forward_hook(lambda module, inputs, output: output + 1)
    captured = capture(module, (torch.randn(2, 4),), on_guard_failure="recapture").module
    x = torch.randn(2, 4)
    assert_same(module.grown(x), captured.grown(x))
    assert len(captured.captures) == 2
    assert inspect.signature(captured.grown.__self__.forward) == inspect.signature(module.forward)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_what_recaptures(duplicate):
    module = Decides().eval()
    captured = capture(module, (torch.randn(2, 4),), on_guard_failure="recapture").module
    captured(torch.randn(8, 4))
    other = duplicate(captured)
    assert len(other.captures) == 2
    for size in (2, 8):
        x = torch.randn(size, 4)
        assert_same(module(x), other(x))
    with torch.no_grad():
        other.fc.weight.zero_()
    assert not torch.equal(other(torch.ones(2, 4)), module(torch.ones(2, 4)))
    assert len(other.captures) == 2


@pytest.mark.parametrize(
    ("line", "follows"),
    [
        ("isinstance(x, (str, int))", True),
        ("list(map(int, [1.0]))", True),
        ("size: int = 2", True),
        ("(lambda part: int(part))(x.shape[0])", True),
        ("torch.zeros(1, dtype=int)", False),
        ("isinstance(x, str) or x.to(int)", False),
        ("kind = int", False),
    ],
)
def test_int_of_a_size_is_followed_unless_its_file_hands_the_type_on(line, follows, tmp_path, monkeypatch):
    name = "sizes_" + "".join(filter(str.isalnum, line))
    forward = f"    def forward(self, x):\n        {line}\n        return x[: int(x.shape[0] * 0.5)]\n"
    (tmp_path / f"{name}.py").write_text(f"import torch\n\n\nclass Half(torch.nn.Module):\n{forward}")
    monkeypatch.syspath_prepend(tmp_path)
    captured = capture(importlib.import_module(name).Half(), (torch.randn(4),))
    assert captured.opaque == ()
    if follows:
        assert captured.module(torch.randn(8)).shape == (4,)
    else:
        with pytest.raises(GuardError):
            captured.module(torch.randn(8))


TYPED = """\
import torch
from torch import nn
from fxopt.capture import capture

class Half(nn.Module):
    def forward(self, x):
        return x[: int(x.shape[0] * 0.5)]

print(capture(Half(), (torch.zeros(4),)).module(torch.zeros(8)).shape)
"""


def test_int_of_a_size_is_followed_in_what_is_typed_into_an_interpreter():
    done = subprocess.run([sys.executable], input=TYPED, capture_output=True, text=True, check=True)
    assert done.stdout == "torch.Size([4])\n"


class Joins(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.join = join

    def forward(self, x):
        return self.join(x * 2)


@pytest.mark.parametrize(
    "join",
    [
        lambda x: torch.cat(list(x)),
        lambda x: torch.cat(tuple(x), dim=0) + 1,
        lambda x: torch.stack(x.unbind()),
        lambda x: torch.stack(list(x), 0).add_(x),
    ],
)
def test_parts_that_are_only_joined_again_may_be_any_number(join):
    captured = capture(Joins(join), (torch.randn(3, 2, 4),))
    assert not captured.guards
    for rows in (3, 1, 5):
        x = torch.randn(rows, 2, 4)
        assert_same(captured.module(x), join(x * 2))


@pytest.mark.parametrize(
    "join",
    [
        lambda x: torch.cat(list(x)[::-1]),
        lambda x: torch.cat(list(x)[:2]),
        lambda x: torch.cat(list(x), 1),
        lambda x: torch.cat([*x.unbind(1)]),
        lambda x: torch.stack([part + 1 for part in x]),
        lambda x: torch.stack(parts := list(x)) + parts[0],
    ],
)
def test_parts_that_are_used_otherwise_are_counted(join):
    captured = capture(Joins(join), (torch.randn(3, 3, 4),))
    assert captured.guards
    x = torch.randn(3, 3, 4)
    assert_same(captured.module(x), join(x * 2))
    with pytest.raises(GuardError, match="3 parts by iteration or 'unbind'"):
        captured.module(torch.randn(5, 5, 4))
