"""What elementwise arithmetic computes, as a sum of products: equal formulas are equal however they are written."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch.fx as fx

from fxopt.graph import name_of, operands
from passes.attention.call import is_number, without_casts

Monomial = frozenset[tuple[Any, float]]
"""A product of values to their powers."""
Polynomial = Mapping[Monomial, float]
"""A sum of them, each with its coefficient."""

_ARITHMETIC = frozenset({"add", "sub", "mul", "div", "neg", "pow", "square", "reciprocal"})
_MOST_TERMS = 8
_FARTHEST = 6


def monomial(**powers: float) -> Monomial:
    """A product by the names of its values."""
    return frozenset(powers.items())


def expand(value: Any, names: Mapping[fx.Node, str]) -> Polynomial:
    """`value` in terms of the values that have names; whatever else is no arithmetic of these stands for itself."""
    if is_number(value):
        return {frozenset(): float(value)}
    value = without_casts(value)
    if value in names:
        return {frozenset({(names[value], 1.0)}): 1.0}
    found = _of_call(value, names) if name_of(value) in _ARITHMETIC else None
    return {frozenset({(value, 1.0)}): 1.0} if found is None or len(found) > _MOST_TERMS else found


def is_equal(left: Polynomial, right: Polynomial) -> bool:
    """Whether both are the same formula, with coefficients as exact as they are mostly written."""
    return left.keys() == right.keys() and all(math.isclose(left[key], right[key], rel_tol=1e-5) for key in left)


def below(value: Any) -> Iterator[fx.Node]:
    """The values that arithmetic may have made `value` of, the nearest first."""
    level = [without_casts(value)]
    for _ in range(_FARTHEST):
        level = [node for node in level if isinstance(node, fx.Node)]
        yield from level
        level = [without_casts(item) for node in level if name_of(node) in _ARITHMETIC for item in node.args]
        level = level[:_MOST_TERMS]


def above(value: fx.Node) -> Iterator[fx.Node]:
    """The results of arithmetic on `value`, the nearest first."""
    level = [value]
    for _ in range(_FARTHEST):
        level = [user for node in level for user in node.users if name_of(user) in _ARITHMETIC][:_MOST_TERMS]
        yield from level


def _of_call(node: fx.Node, names: Mapping[fx.Node, str]) -> Polynomial | None:
    name = name_of(node)
    if name in ("neg", "square", "reciprocal"):
        inner = expand(node.args[0], names) if len(node.args) == 1 and not node.kwargs else {}
        if name == "neg":
            return _times(inner, {frozenset(): -1.0})
        return _power(inner, 2.0 if name == "square" else -1.0)
    both = operands(node)
    if both is None:
        return None
    if name == "pow":
        return _power(expand(both[0], names), float(both[1])) if is_number(both[1]) else None
    left, right = expand(both[0], names), expand(both[1], names)
    if name == "mul":
        return _times(left, right)
    if name == "div":
        inverse = _power(right, -1.0)
        return None if inverse is None else _times(left, inverse)
    return _plus(left, right if name == "add" else _times(right, {frozenset(): -1.0}))


def _plus(left: Polynomial, right: Polynomial) -> Polynomial:
    total: dict[Monomial, float] = defaultdict(float, left)
    for key, coefficient in right.items():
        total[key] += coefficient
    return {key: coefficient for key, coefficient in total.items() if coefficient}


def _times(left: Polynomial, right: Polynomial) -> Polynomial:
    total: Polynomial = {}
    for a, x in left.items():
        for b, y in right.items():
            powers: dict[Any, float] = defaultdict(float, a)
            for value, power in b:
                powers[value] += power
            total = _plus(total, {frozenset((v, p) for v, p in powers.items() if p): x * y})
    return total


def _power(base: Polynomial, exponent: float) -> Polynomial | None:
    if exponent in (1.0, 2.0, 3.0):
        product = base
        for _ in range(int(exponent) - 1):
            product = _times(product, base)
        return product
    if len(base) != 1:
        return None
    ((key, coefficient),) = base.items()
    whole = exponent.is_integer()
    # A root undoes a power only where the value is positive.
    if not whole and (key or coefficient <= 0):
        return None
    try:
        return {frozenset((value, power * exponent) for value, power in key): coefficient**exponent}
    except (ZeroDivisionError, OverflowError):  # Python has no number for it, where tensors have infinity
        return None
