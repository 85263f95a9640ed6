"""Numbers that remember the node that computes them.

A size of an input is an `int` to the user's code, so that all of Python works with it; but arithmetic on it
is recorded, and whatever needs its concrete value (a comparison, `bool`, a list repeated by it) tells the
recorder, which makes a guard of it. It only says that it is an `int`: of a true one, Python's own code reads the
digits unasked, as in `0.5 * size` or `layers[size]`. Torch's functions take it since it is a `SymInt` to them; they
are called with the plain number.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
import torch.fx as fx

from fxopt.capture.messages import is_message
from fxopt.capture.provenance import Depends


class Sink(Protocol):
    """The recorder, as far as traced numbers know it."""

    def arithmetic(self, function: Callable[..., Any], operands: tuple[Any, ...], result: Any) -> Any:
        """Record an operation on numbers and return the traced result."""

    def compared(self, relation: str, left: Traced, right: Any, answer: bool) -> None:
        """Note that the user's code depends on the answer of a comparison."""


class Traced:
    """What traced integers and floats share.

    Attributes:
        trace: the recorder, until capture ends.
        node: the node that computes the number.
        depends: what the number depends on.
    """

    trace: Sink | None
    node: fx.Node
    depends: Depends


class TracedInt(torch.SymInt, Traced):
    """An integer with a node."""

    imag = 0
    denominator = 1

    def __init__(self, number: int):
        self.number = number

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        return int


class TracedFloat(float, Traced):
    """A floating-point number with a node."""


def plain(value: Any) -> Any:
    """The number itself, without a node and without a guard."""
    if isinstance(value, TracedInt):
        return value.number
    if isinstance(value, TracedFloat):
        return float.__float__(value)
    return value


def traced(value: int | float, node: fx.Node, depends: Depends, trace: Sink) -> Any:
    """Attach a node to a number. A bool comes back as it is: it can't carry one."""
    if isinstance(value, bool):
        return value
    number: Any = TracedInt(plain(value)) if isinstance(value, int) else TracedFloat(value)
    number.trace, number.node, number.depends = trace, node, depends
    return number


def concrete(value: Any) -> Any:
    """The number itself; a guard remembers that the user's code came to depend on it."""
    number = plain(value)
    if isinstance(value, Traced) and value.trace is not None:
        value.trace.compared("==", value, number, True)
    return number


RELATIONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}

_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "lshift", "rshift")
_UNARY: dict[str, Callable[..., Any]] = {
    "neg": operator.neg,
    "pos": operator.pos,
    "abs": operator.abs,
    "invert": operator.invert,
}
_READS = ("bit_length", "bit_count", "to_bytes", "as_integer_ratio", "is_integer", "hex")
_ROUNDING: dict[str, Callable[..., Any]] = {"floor": math.floor, "ceil": math.ceil, "trunc": math.trunc, "round": round}


def _operator(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(operator, f"{name}_" if name in ("and", "or") else name)
    return function


def _binary(base: type, name: str, reflected: bool) -> Callable[[Any, Any], Any]:
    compute = getattr(base, f"__{'r' if reflected else ''}{name}__")
    function = _operator(name)

    def method(self: Any, other: Any) -> Any:
        if isinstance(other, (list, tuple, str)) and name == "mul":
            return other * concrete(self)
        if isinstance(other, complex):
            return function(other, concrete(self)) if reflected else function(concrete(self), other)
        number = plain(other)
        result = compute(plain(self), number)
        if result is NotImplemented and isinstance(number, float) and base is int:
            # The float would answer, but without a node.
            mirrored = getattr(float, f"__{'' if reflected else 'r'}{name}__", None)
            result = mirrored(number, plain(self)) if mirrored else NotImplemented
        if result is NotImplemented or self.trace is None:
            return result
        operands = (other, self) if reflected else (self, other)
        return self.trace.arithmetic(function, operands, result)

    return method


def _unary(base: type, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    compute = getattr(base, f"__{name}__")

    def method(self: Any, *digits: Any) -> Any:
        result = compute(plain(self), *digits)
        if self.trace is None:
            return result
        return self.trace.arithmetic(function, (self, *digits), result)

    return method


def _comparison(base: type, relation: str) -> Callable[[Any, Any], Any]:
    function = RELATIONS[relation]
    compute = getattr(base, f"__{function.__name__}__")

    def method(self: Any, other: Any) -> Any:
        number = plain(other)
        answer = compute(plain(self), number)
        if answer is NotImplemented:
            if not isinstance(number, (int, float)):
                return answer
            answer = function(float(plain(self)), number)
        if self.trace is not None:
            self.trace.compared(relation, self, other, answer)
        return answer

    return method


def _concretion(base: type, name: str) -> Callable[..., Any]:
    compute = getattr(base, name)

    def method(self: Any, *rest: Any) -> Any:
        return compute(concrete(self), *rest)

    return method


def _text(base: type, name: str) -> Callable[..., Any]:
    compute = getattr(base, name)

    def method(self: Any, *rest: Any) -> Any:
        # Text may be a key or an attribute's name. A message of a value of the input is another one at each call, so
        # the code that tells it stays as it is.
        unread = self.trace is None or (self.depends is not Depends.DATA and is_message())
        return compute(plain(self) if unread else concrete(self), *rest)

    return method


def _truth(self: Any) -> bool:
    answer = bool(plain(self))
    if self.trace is not None:
        self.trace.compared("!=", self, 0, answer)
    return answer


def _divmod(self: Any, other: Any) -> tuple[Any, Any]:
    return self // other, self % other


def _rdivmod(self: Any, other: Any) -> tuple[Any, Any]:
    return other // self, other % self


def _array(self: Any, dtype: Any = None, copy: Any = None) -> np.ndarray[Any, Any]:
    return np.array(concrete(self), dtype)


def _install(cls: Any, base: Any) -> None:
    for name in _BINARY:
        if hasattr(base, f"__{name}__"):
            setattr(cls, f"__{name}__", _binary(base, name, reflected=False))
            setattr(cls, f"__r{name}__", _binary(base, name, reflected=True))
    for name, function in (_UNARY | _ROUNDING).items():
        if hasattr(base, f"__{name}__"):
            setattr(cls, f"__{name}__", _unary(base, name, function))
    for relation, function in RELATIONS.items():
        setattr(cls, f"__{function.__name__}__", _comparison(base, relation))
    for name in ("__int__", "__index__", "__float__", "__hash__"):
        if hasattr(base, name):
            setattr(cls, name, _concretion(base, name))
    cls.__bool__ = _truth
    setattr(cls, "__divmod__", _divmod)  # noqa: B010  mypy takes the assignment for a call of divmod
    setattr(cls, "__rdivmod__", _rdivmod)  # noqa: B010
    cls.__array__ = _array
    for name in ("__repr__", "__str__", "__format__"):
        setattr(cls, name, _text(base, name))
    for name in _READS:
        if hasattr(base, name):
            setattr(cls, name, _concretion(base, name))
    for name in ("real", "numerator") if base is int else ("real",):
        setattr(cls, name, property(lambda self: self))
    cls.conjugate = lambda self: self
    # A number that outlives capture, say as an attribute of the module, is a plain one when it is copied.
    cls.__reduce__ = lambda self: (base, (plain(self),))
    cls.__copy__ = plain
    cls.__deepcopy__ = lambda self, memo: plain(self)


_install(TracedInt, int)
_install(TracedFloat, float)
