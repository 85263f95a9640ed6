"""The arguments of a call in one form, whichever way they are written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fxopt.engines.one_form import OneForm


def plain(x: Any, mask: Any = None, scale: Any = 1.0) -> None: ...
def named(x: Any, *, mask: Any = None) -> None: ...
def many(*parts: Any, **others: Any) -> None: ...


@pytest.mark.parametrize(
    ("function", "args", "kwargs", "expected"),
    [
        pytest.param(plain, ("x",), {}, (("x", None, 1.0), {}), id="defaults"),
        pytest.param(plain, ("x",), {"scale": 2}, (("x", None, 2), {}), id="one in the middle is left out"),
        pytest.param(plain, (), {"scale": 2, "x": "x"}, (("x", None, 2), {}), id="named in another order"),
        pytest.param(named, ("x",), {}, (("x",), {"mask": None}), id="what only a name can give"),
        pytest.param(many, (1, 2), {"b": 3, "a": 4}, ((1, 2), {"b": 3, "a": 4}), id="as many as there are"),
    ],
)
def test_a_call_in_one_form(function: Callable[..., None], args: Any, kwargs: Any, expected: Any) -> None:
    form = OneForm(function)
    assert form(args, kwargs) == expected
    assert form(args, kwargs) == expected, "and again, by what is known"


def test_a_call_that_the_function_does_not_take() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        OneForm(plain)((1,), {"other": 2})
