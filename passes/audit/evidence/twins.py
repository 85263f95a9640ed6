"""What the tensors of an exact run are in a lower precision, and where that loses them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from passes.audit.evidence.driver import UNWRITTEN

# What is as large as this is a mask, and another type would have one of its own.
_MASK = 1e30


@dataclass(frozen=True)
class Twin:
    """What a tensor is in low precision.

    Attributes:
        value: rounded, held in float32.
        error: its distance from the exact tensor, relative to the norm of that.
    """

    value: torch.Tensor
    error: float


@dataclass(frozen=True)
class Slip:
    """What an operator lost.

    Attributes:
        kind: overflow, underflow or error.
        value: the largest magnitude of the exact result; of an error, its relative size.
        given: the largest relative error of the operands.
    """

    kind: str
    value: float
    given: float


class Result:
    """One tensor that an operator of the exact run returned."""

    def __init__(self, exact: torch.Tensor, fresh: bool):
        self.exact, self.fresh = exact, fresh

    @functools.cached_property
    def largest(self) -> float:
        """The largest magnitude."""
        return max(map(abs, map(float, self.exact.aminmax())))

    @functools.cached_property
    def norm(self) -> float:
        """The Euclidean norm."""
        return float(torch.linalg.vector_norm(self.exact))


class Twins:
    """Follows a float64 run in one lower precision.

    float64 stands for the type of the model. What is cast to float32 on purpose stays float32 here, as it does in
    a model of half precision; and sums are kept in float32, as accelerators keep them.

    Args:
        dtype: the precision.
        bound: the relative error that is a slip.
    """

    def __init__(self, dtype: torch.dtype, bound: float):
        self.dtype, self.bound = dtype, bound
        self._of = WeakIdKeyDictionary()

    def of(self, exact: torch.Tensor) -> Twin:
        """The twin of a tensor; one that was there before the run is rounded now."""
        found: Twin | None = self._of.get(exact)
        if found is None:
            found = Twin(self._rounded(exact), 0.0)
            if not isinstance(exact, nn.Parameter):  # each is read once, mostly: to keep all would double the memory
                self._of[exact] = found
        return found

    def follow(self, func: Any, args: Any, known: dict[int, Twin], results: list[Result | None]) -> Iterator[Slip]:
        """Run an operator on the twins of its operands; `known` has them by the identity of the exact ones."""
        before = max(twin.error for twin in known.values())
        values = self._run(func, args, known, results)
        judged = False
        for result, value in zip(results, values, strict=True):
            if result is None:
                continue
            if value is None or result.exact.layout is not torch.strided or not result.exact.numel():
                self._of[result.exact] = Twin(self._rounded(result.exact), before)
                continue
            # What comes beside the first result are statistics for the backward, such as a mean that is about 0.
            slip, error = self._judge(result, value, before) if result.fresh and not judged else (None, before)
            judged = True
            self._of[result.exact] = Twin(value, error)
            if slip is not None:
                yield slip

    def _run(self, func: Any, args: Any, known: dict[int, Twin], results: list[Result | None]) -> list[Any]:
        """The values; each None where they have to be taken from the exact results."""
        nothing = [None] * len(results)
        if torch.Tag.nondeterministic_seeded in func.tags or (None in results and func._schema.is_mutable):
            return nothing
        if func.name().partition(".")[0] in UNWRITTEN:
            return nothing
        low = pytree.tree_map(lambda leaf: _lowered(leaf, known), args)
        try:
            leaves = pytree.tree_leaves(func(*low[0], **low[1]))
        except Exception:  # an operator may have no form for mixed types
            return nothing
        made = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        same = len(made) == len(results) and all(
            result is None or result.exact.shape == value.shape for result, value in zip(results, made, strict=True)
        )
        return list(made) if same else nothing

    def _judge(self, result: Result, value: torch.Tensor, before: float) -> tuple[Slip | None, float]:
        if result.exact.dtype is torch.float64:
            value.copy_(value.to(self.dtype))
        if not result.largest < _MASK:
            value.copy_(self._rounded(result.exact))
            return None, before
        error = float(torch.linalg.vector_norm(value - result.exact)) / result.norm if result.norm else 0.0
        if not error < float("inf"):
            value.copy_(result.exact)  # as it is, lest what is made of it is told of too
            return Slip("overflow", result.largest, before), before
        limits = torch.finfo(self.dtype)
        if 0 < result.largest <= limits.smallest_normal * limits.eps / 2:
            return Slip("underflow", result.largest, before), error
        return (Slip("error", error, before) if error > self.bound else None), error

    def _rounded(self, exact: torch.Tensor) -> torch.Tensor:
        if exact.dtype is not torch.float64:
            return exact.detach().clone()
        limit = torch.finfo(self.dtype).max
        return exact.detach().to(self.dtype).float().clamp_(-limit, limit)


def _lowered(leaf: Any, known: dict[int, Twin]) -> Any:
    if isinstance(leaf, torch.Tensor):
        return known[id(leaf)].value if id(leaf) in known else leaf
    return torch.float32 if leaf is torch.float64 else leaf
