"""Integers as sums of sizes: `(x.shape[1] + past) - x.shape[1]` is `past`, whatever the size is."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch.fx as fx

Sum = Mapping[fx.Node | None, int]
"""How often each number is in a sum. None stands for 1."""


def sum_of(value: fx.Node | int, known: Mapping[fx.Node, Sum]) -> Sum:
    """A number as a sum; one of which nothing is known is a sum of itself."""
    if isinstance(value, fx.Node):
        return known.get(value, {value: 1})
    return {None: value} if value else {}


def result_of(function: Callable[..., Any], terms: tuple[Sum, ...]) -> Sum | None:
    """The result of an operation on integers as a sum, where it is one: without a number in it, it is constant."""
    if function is operator.add:
        return _added(*terms)
    if function in (operator.sub, operator.neg):
        *first, last = terms
        return _added(*first, {number: -count for number, count in last.items()})
    if function is operator.mul:
        factor, rest = sorted(terms, key=lambda term: bool(term.keys() - {None}))
        return None if factor.keys() - {None} else {n: factor[None] * c for n, c in rest.items() if factor}
    return None


def _added(*terms: Sum) -> Sum:
    counts: dict[fx.Node | None, int] = {}
    for term in terms:
        for number, count in term.items():
            counts[number] = counts.get(number, 0) + count
    return {number: count for number, count in counts.items() if count}
