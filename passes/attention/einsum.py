"""Matrix products that are written as equations.

einsum("bhid,bhjd->bhij", q, k)   =>   q @ k.transpose(-2, -1)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx as fx

from fxopt.contract import Change
from fxopt.graph import Region, inherit, source_of
from passes.attention.call import shape_of


def recognise_product(node: fx.Node, region: Region) -> Change | None:
    """The matrix products, one for each of a batch, that `node` computes, if it is such an equation."""
    if node.target is not torch.einsum or node.kwargs or region.is_spared(node):
        return None
    equation, *given = node.args
    if len(given) == 1 and isinstance(given[0], (list, tuple)):
        given = [*given[0]]
    values = [value for value in given if isinstance(value, fx.Node)]
    terms = _terms(equation) if isinstance(equation, str) and len(given) == len(values) == 2 else None
    if terms is None:
        return None
    first, second, out = terms
    sizes: dict[str, int] = {}
    for term, value in ((first, values[0]), (second, values[1])):
        shape = shape_of(value)
        if shape is None or any(
            sizes.setdefault(letter, size) != size for letter, size in zip(term, shape, strict=True)
        ):
            return None  # an axis of size 1 is repeated
    batch = [letter for letter in out if letter in first and letter in second]
    (row, column), (summed,) = (letter for letter in out if letter not in batch), {*first} - {*out}
    where, line = region.qualified(node), source_of(node)
    if row in second:
        first, second, values = second, first, values[::-1]
    left = _reordered(values[0], first, [*batch, row, summed], node, region)
    right = _reordered(values[1], second, [*batch, summed, column], node, region)
    product = inherit(region.insert_function(node, torch.matmul, (left, right)), node)
    made = [*batch, row, column]
    shape = torch.Size(sizes[letter] for letter in made)
    product.meta["tensor_meta"] = node.meta["tensor_meta"]._replace(shape=shape)
    region.replace(node, _reordered(product, made, out, node, region))  # in the memory that einsum gives it too
    return Change("computed by matmul", where, line)


def _terms(equation: str) -> tuple[str, str, str] | None:
    """The axes of both operands and of the result, where there is one of each kind beside those of a batch."""
    operands, _, out = equation.replace(" ", "").partition("->")
    first, _, second = operands.partition(",")
    if not all(term.isalpha() and len({*term}) == len(term) for term in (first, second, out)):
        return None
    batch = {*first} & {*second} & {*out}
    kinds = ({*first} & {*second}) - {*out}, ({*first} & {*out}) - batch, ({*second} & {*out}) - batch
    is_whole = {*first, *second} == {*out} | kinds[0]
    return (first, second, out) if batch and is_whole and all(len(kind) == 1 for kind in kinds) else None


def _reordered(value: fx.Node, axes: Sequence[str], wanted: Sequence[str], before: fx.Node, region: Region) -> fx.Node:
    """`value` with its axes in another order; itself where that is theirs."""
    order = [axes.index(letter) for letter in wanted]
    rank = len(order)
    if order == [*range(rank)]:
        return value
    is_transposed = order == [*range(rank - 2), rank - 1, rank - 2]
    name, arguments = ("transpose", (-2, -1)) if is_transposed else ("permute", tuple(order))
    with region.graph.inserting_before(before):
        made = region.graph.call_method(name, (value, *arguments))
    meta = value.meta["tensor_meta"]
    shape, stride = (tuple(sizes[axis] for axis in order) for sizes in (meta.shape, meta.stride))
    made.meta["tensor_meta"] = meta._replace(shape=torch.Size(shape), stride=stride, memory_format=None)
    return made
