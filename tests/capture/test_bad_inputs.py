"""What can't be captured is refused as eager refuses it; unusual inputs and outputs are handled."""

from __future__ import annotations

import enum
import traceback
from argparse import Namespace
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, Normal

from fxopt.capture import capture
from fxopt.errors import GuardError
from tests.capture.agree import assert_same


class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        raise LookupError(f"no row {x.shape[0]}")


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Raises()

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize("factory", [Raises, Outer])
def test_an_error_of_the_model_stays_what_it_is(factory):
    with pytest.raises(LookupError, match="no row 3") as raised:
        capture(factory(), (torch.ones(3, 4),))
    functions = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert functions[-1] == "forward"
    assert raised.value.__notes__[0].startswith(
        f"raised by the forward of '{factory.__name__}' itself at test_bad_inputs.py:"
    )


@pytest.mark.parametrize(
    ("args", "kwargs", "error"),
    [((), {}, TypeError), ((torch.ones(2, 5),), {}, RuntimeError), ((torch.ones(2, 4),), {"other": 1}, TypeError)],
)
def test_wrong_inputs_raise_what_eager_raises(args, kwargs, error):
    module = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(error) as eager:
        module(*args, **kwargs)
    with pytest.raises(error) as raised:
        capture(module, args, kwargs)
    assert str(raised.value) == str(eager.value)


class Of(nn.Module):
    """Runs a function of its inputs beside a layer."""

    def __init__(self, function: Any):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(self.fc, *args, **kwargs)


def _sparse(fc, x):
    return torch.sparse.mm(x, fc.weight)


def _nested(fc, x):
    return fc(x)


def _quantized(fc, x):
    return fc(x.dequantize())


def _complex(fc, x):
    return fc(x.real) * x


def _numbers(fc, x, scale, shift=0, name="a", on=True, none=None):
    return fc(x) * scale + shift if on and none is None and name == "a" else x


def _generator(fc, x, generator):
    return fc(x) + torch.rand(x.shape, generator=generator)


def _none(fc, x):
    fc(x)


def _nones(fc, x):
    return None, [None, fc(x)], {}


def _itself(fc, x):
    return x


def _itself_and_more(fc, x, y):
    return y, fc(x), x, [x]


def _numbers_out(fc, x):
    return fc(x), x.shape[0], 3, "text", x.dtype, tuple(x.shape)


def _shapes_out(fc, x):
    out = fc(x)
    return out.shape, [out, {"rows": (out.size(), torch.Size([3]), out.shape[:1])}]


def _distributions_out(fc, x):
    return Normal(fc(x), 1.0), Independent(Normal(fc(x), fc(x).exp()), 1), Categorical(logits=fc(x))


def _mixed(fc, data):
    return {key: fc(value) if isinstance(value, torch.Tensor) else value for key, value in data.items()}


X = torch.randn(3, 4)
UNUSUAL = {
    "sparse": (_sparse, lambda: (torch.eye(4).to_sparse(),), {}),
    "sparse_csr": (_sparse, lambda: (torch.eye(4).to_sparse_csr(),), {}),
    "nested": (
        _nested,
        lambda: (torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged),),
        {},
    ),
    "quantized": (_quantized, lambda: (torch.quantize_per_tensor(X, 0.1, 0, torch.quint8),), {}),
    "complex": (_complex, lambda: (torch.complex(X, X),), {}),
    "numbers": (_numbers, lambda: (X, 2), {"shift": 0.5, "name": "a", "on": True, "none": None}),
    "none_out": (_none, lambda: (X,), {}),
    "nones_out": (_nones, lambda: (X,), {}),
    "itself": (_itself, lambda: (X,), {}),
    "itself_and_more": (_itself_and_more, lambda: (X, {"a": [X]}), {}),
    "numbers_out": (_numbers_out, lambda: (X,), {}),
    "shapes_out": (_shapes_out, lambda: (X,), {}),
    "distributions_out": (_distributions_out, lambda: (X,), {}),
    "mixed": (_mixed, lambda: ({"a": X, "b": 3, "c": "text", "d": None},), {}),
}


@pytest.mark.filterwarnings("ignore:.*beta state:UserWarning", "ignore:.*prototype stage:UserWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantized tensor.*deprecated:UserWarning")
@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_inputs_and_outputs(name):
    function, make, kwargs = UNUSUAL[name]
    args = make()
    module = Of(function).eval()
    captured = capture(module, args, kwargs)
    expected, actual = module(*args, **kwargs), captured.module(*args, **kwargs)
    if name == "nested":
        expected, actual = list(expected.unbind()), list(actual.unbind())
    assert_same(expected, actual)
    assert captured.opaque == ()


def _apart(fc, a, b, more):
    return fc(a) - 2 * fc(b) + 3 * more["c"]


class AttendsOpaquely(nn.Module):
    """A part that is captured by itself, and that opaque code gives one tensor as two."""

    def __init__(self):
        super().__init__()
        self.part = Of(lambda fc, a, b: fc(a) - 2 * b)

    def forward(self, a, b, more):
        return self.part(a, a) if a.sum() > 100 else self.part(a, b) + self.part(b, more["c"])


@pytest.mark.parametrize("make", [lambda: Of(_apart), AttendsOpaquely])
@pytest.mark.parametrize("scale", [1, 1000])
def test_one_tensor_given_as_several_arguments_stands_for_several(make, scale):
    module, x = make(), torch.ones(3, 4) * scale
    captured = capture(module, (x, x, {"c": x})).module
    for given in ((x, x, x), torch.rand(3, 3, 4), torch.rand(3, 3, 4) * 1000):
        a, b, c = given
        assert_same(module(a, b, {"c": c}), captured(a, b, {"c": c}))


def test_attention_of_one_tensor_to_itself_is_attention_to_others_too():
    module = nn.MultiheadAttention(4, 2)
    captured = capture(module, (X, X, X))
    assert captured.opaque == ()
    assert_same(module(X, X, X), captured.module(X, X, X))
    assert_same(module(X, X + 1, X), captured.module(X, X + 1, X))


def test_numbers_are_inputs_not_constants():
    captured = capture(Of(_numbers).eval(), (X, 2), {"shift": 0.5}).module
    module = Of(_numbers).eval()
    module.load_state_dict(captured.state_dict())
    assert_same(module(X, 3, shift=0.25), captured(X, 3, shift=0.25))


class Kind(enum.IntEnum):
    PLAIN = 1
    DOUBLED = 2


class Sized(NamedTuple):
    x: torch.Tensor
    times: int


@dataclass
class Batch:
    x: torch.Tensor
    kind: Kind


GUARDED = {
    "enum": (lambda fc, x, kind: fc(x) if kind is Kind.PLAIN else x, (X, Kind.PLAIN), (X, Kind.DOUBLED)),
    "enum of a dataclass": (
        lambda fc, b: b.x if b.kind is Kind.PLAIN else -b.x,
        (Batch(X, Kind(1)),),
        (Batch(X, Kind(2)),),
    ),
    "dtype": (lambda fc, x, dtype: fc(x).to(dtype), (X, torch.float64), (X, torch.float16)),
    "range": (lambda fc, x, steps: fc(x) * sum(steps), (X, range(3)), (X, range(4))),
    "slice": (lambda fc, x, part: fc(x)[part], (X, slice(2)), (X, slice(1, 2))),
    "complex": (lambda fc, x, z: fc(x) * z.imag, (X, 1 + 2j), (X, 1 + 3j)),
    "bytes": (lambda fc, x, text: fc(x) * len(text), (X, b"a"), (X, b"ab")),
    "class": (lambda fc, c: fc(c.x), (SimpleNamespace(x=X),), (Namespace(x=X),)),
    "no object": (lambda fc, x, c: fc(x) if c is None else fc(x + c.x), (X, SimpleNamespace(x=X)), (X, None)),
    "no list": (lambda fc, x, c: fc(x) if c is None else fc(x + c[0]), (X, [X]), (X, None)),
    "no dict": (lambda fc, x, c: fc(x) if c is None else fc(x + c["x"]), (X, {"x": X}), (X, None)),
    "dimensions within a dict": (
        lambda fc, d: fc(d["x"]).sum(0) if d["x"].dim() == 2 else d["x"],
        ({"x": X},),
        ({"x": X[0]},),
    ),
}


@pytest.mark.parametrize("name", GUARDED)
def test_an_input_that_no_node_computes_with_is_guarded(name):
    function, given, other = GUARDED[name]
    module = Of(function).eval()
    captured = capture(module, given)
    assert captured.opaque == ()
    assert_same(module(*given), captured.module(*given))
    with pytest.raises(GuardError, match=r"\(an input\), but it is .* here"):
        captured.module(*other)


FOLLOWED = {
    "size": (lambda fc, x, size: fc(x).reshape(size) * size[0], (X, torch.Size([3, 4])), (X, torch.Size([4, 3]))),
    "named tuple": (lambda fc, b: fc(b.x) * b.times, (Sized(X, 2),), (Sized(X, 3),)),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_numbers_within_tuples_of_other_types_are_inputs_too(name):
    function, given, other = FOLLOWED[name]
    module = Of(function).eval()
    captured = capture(module, given)
    assert captured.opaque == ()
    assert_same(module(*other), captured.module(*other))


UNFOLLOWED = {
    "function": (lambda fc, x, act: fc(act(x)), (X, torch.relu), (X, torch.tanh)),
    "set": (lambda fc, x, steps: fc(x) * sum(steps), (X, {1, 2}), (X, {1, 3})),
    "array": (lambda fc, x, array: fc(x) * float(array.sum()), (X, np.ones(3)), (X, np.ones(4))),
    "number of numpy": (lambda fc, x, n: fc(x)[:n], (X, np.int64(1)), (X, np.int64(2))),
}


@pytest.mark.parametrize("name", UNFOLLOWED)
def test_what_is_given_an_input_that_no_graph_can_follow_is_opaque(name):
    function, given, other = UNFOLLOWED[name]
    module = Of(function).eval()
    captured = capture(module, given)
    assert "whose contents a graph can't follow" in captured.opaque[0].reason
    assert_same(module(*other), captured.module(*other))


class Asks(nn.Module):
    """Asks something of the dtype of its input."""

    def __init__(self, question):
        super().__init__()
        self.question = question
        self.register_buffer("scale", torch.tensor(255.0))

    def forward(self, image):
        return image.float() / self.scale if self.question(image) else image


DTYPES = {
    "compared": lambda image: image.dtype == torch.uint8,
    "asked of the dtype": lambda image: not image.dtype.is_floating_point,
    "asked of the tensor": lambda image: not image.is_floating_point(),
    "asked of torch": lambda image: not torch.is_floating_point(input=image),
    "of a part": lambda image: image[:, 0].dtype == torch.uint8,
}


@pytest.mark.parametrize("name", DTYPES)
def test_what_was_decided_on_the_dtype_of_an_input_is_guarded(name):
    module, images = Asks(DTYPES[name]), torch.full((3, 4), 51, dtype=torch.uint8)
    for given, other, said in ((images, X, "of dtype torch.uint8"), (X, images, "of a floating point dtype")):
        captured = capture(module, (given,))
        assert captured.opaque == ()
        assert_same(module(given), captured.module(given))
        with pytest.raises(GuardError, match=rf"image.* {said} \(test_bad_inputs.py:\d+\), but it is torch"):
            captured.module(other)


def test_what_was_captured_in_one_floating_point_dtype_can_be_cast():
    module = Of(lambda fc, x: fc(x) + torch.ones(4, dtype=x.dtype)).eval()
    captured = capture(module, (X,)).module
    assert_same(module.double()(X.double()), captured.double()(X.double()))
    torch.testing.assert_close(captured.half()(X.half()), module.half()(X.half()), check_dtype=False)


OFFSET = torch.full((4,), 2.0)


class Defaults(nn.Module):
    """Parameters with defaults of all kinds."""

    def forward(self, x, sizes=(2, (0.5,)), steps=[1, 2], act=torch.relu, shift=OFFSET):  # noqa: B006
        return act(x * sizes[0] + sizes[1][0]) + sum(steps) + shift


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sizes": (2, (0.5,))}, None),
        ({"sizes": (3, (0.5,))}, r"sizes is \(2, \(0.5,\)\)"),
        ({"steps": [1, 3]}, r"steps is not given \(an input\), but it is \[1, 3\] here"),
        ({"steps": None}, "steps is not given"),
        ({"act": torch.tanh}, "act is not given"),
        ({"shift": torch.ones(4)}, r"shift is not given \(an input\), but it is a tensor of shape \(4,\) here"),
    ],
)
def test_what_was_left_to_its_default_stays_so(given, said):
    module = Defaults()
    captured = capture(module, (X,))
    assert captured.opaque == ()
    assert [type(step) for step in module.forward.__defaults__[1]] == [int, int]
    x = torch.randn(5, 4)
    assert_same(module(x), captured.module(x))
    if said is None:
        assert_same(module(x, **given), captured.module(x, **given))
    else:
        with pytest.raises(GuardError, match=said):
            captured.module(x, **given)


def test_a_tuple_that_was_given_can_be_left_to_its_default_later():
    module = Defaults()
    captured = capture(module, (X,), {"sizes": (3, (1.5,))})
    assert_same(module(X, sizes=(4, (2.5,))), captured.module(X, sizes=(4, (2.5,))))
    assert_same(module(X), captured.module(X))


def test_a_generator_of_random_numbers_is_drawn_from_equally():
    module = Of(_generator).eval()
    captured = capture(module, (X, torch.Generator().manual_seed(1)))
    for seed in (1, 2):
        generators = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
        assert_same(module(X, generators[0]), captured.module(X, generators[1]))
    assert [opaque.reason for opaque in captured.opaque if "Generator" not in opaque.reason] == []
