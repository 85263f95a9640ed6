"""What a module gave for an input, and how two such outcomes differ."""

from __future__ import annotations

import cmath
import math
import sys
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch

from fxopt.contract import Promise
from fxopt.relative_error import TOLERANCE, relative_error, share_of_others

_WIDE: frozenset[Any] = frozenset({torch.float64, torch.complex128})
"""What a float64 run gives where the model itself gives fewer bits."""
_GRADIENT_SLACK = 10.0
"""By how much more gradients may differ than outputs: they are summed over batches and places."""
_GRADIENT_ROUNDING = 32.0
"""Steps of rounding, of the largest gradient, that any gradient may differ by."""


@dataclass(frozen=True)
class Outcome:
    """What one module gave for one input.

    Attributes:
        values: of the output, flat and in order.
        structure: of the output.
        gradients: by parameter, where the module trains and the output depends on it.
        trainable: the parameters that ask for a gradient, with their shapes.
        dtypes: what the module computes in, whatever its outputs are cast to.
    """

    values: tuple[Any, ...]
    structure: Any
    gradients: Mapping[str, torch.Tensor]
    trainable: Mapping[str, torch.Size]
    dtypes: frozenset[torch.dtype] = frozenset()

    def with_nan_of(self, other: Outcome) -> Outcome:
        """The same, with NaN where `other` has it."""
        values = self.values
        if self.structure == other.structure:
            values = tuple(map(_with_nan_of, values, other.values))
        gradients = {name: _with_nan_of(each, other.gradients.get(name)) for name, each in self.gradients.items()}
        return replace(self, values=values, gradients=gradients)


@dataclass(frozen=True)
class Difference:
    """How two outcomes differ.

    Attributes:
        error: the largest relative error; infinite where shapes, dtypes or structures differ.
        allowed: the error that is allowed at the tensor that has it.
        what: in words, where the difference is not one of values.
    """

    error: float
    allowed: float
    what: str = ""

    @property
    def is_broken(self) -> bool:
        """Whether it is more than allowed."""
        return not self.error <= self.allowed


def compare_outcomes(
    before: Sequence[Outcome | None], after: Sequence[Outcome | None], promise: Promise, *, resizes: bool = False
) -> Difference:
    """The worst difference between two modules over all inputs that both took.

    Args:
        before: what the one gave.
        after: what the other gave.
        promise: how far they may differ.
        resizes: values decide on sizes, as those of the boxes that a detector keeps: other values, other sizes.
    """
    worst = Difference(0.0, 0.0)
    for left, right in zip(before, after, strict=True):
        if left is None or right is None:
            if left is not None:
                return Difference(float("inf"), 0.0, "it refuses an input that it took before")
            continue
        found = difference_of(left, right, promise, resizes=resizes)
        if found.is_broken or found.error > worst.error:
            worst = found
        if found.is_broken:
            break
    return worst


def difference_of(
    left: Outcome, right: Outcome, promise: Promise, *, widened: bool = False, resizes: bool = False
) -> Difference:
    """The worst difference; `widened` says that `left` was computed in float64 in place of its own dtype."""
    if left.structure != right.structure:
        return Difference(float("inf"), 0.0, f"the output is {right.structure} in place of {left.structure}")
    worst, dtypes = Difference(0.0, 0.0), left.dtypes | right.dtypes
    for index, (expected, found) in enumerate(zip(left.values, right.values, strict=True)):
        what = f"output {index}" if index else "the output"
        if resizes and promise is Promise.CHANGES and _is_resized(expected, found):
            difference = Difference(1.0, _allowed(promise, dtypes), what)
        else:
            difference = _value_difference(expected, found, promise, dtypes, what, widened=widened)
        if difference.is_broken or difference.error > worst.error:
            worst = difference
        if difference.is_broken:
            return worst
    return worst if promise is Promise.CHANGES else _gradient_difference(left, right, widened=widened) or worst


def _gradient_difference(left: Outcome, right: Outcome, *, widened: bool) -> Difference | None:
    """The first gradient that is not the same; a rewrite may replace parameters, and these can't be compared."""
    largest, dtypes = max(map(_largest, left.gradients.values()), default=0.0), left.dtypes | right.dtypes
    for name, shape in left.trainable.items():
        if right.trainable.get(name) != shape:
            continue
        both = left.gradients.get(name), right.gradients.get(name)
        expected, found = (None if gradient is None else _dense(gradient) for gradient in both)
        if _is_rounding(expected, found, largest):
            continue
        if expected is None or found is None:
            how = "is missing" if found is None else "is new"
            return Difference(float("inf"), 0.0, f"the gradient of '{name}' {how}")
        what = f"the gradient of '{name}'"
        difference = _value_difference(expected, found, Promise.CLOSE, dtypes, what, widened=widened)
        if difference.error > _GRADIENT_SLACK * difference.allowed:
            return Difference(difference.error, _GRADIENT_SLACK * difference.allowed, difference.what)
    return None


def _is_rounding(expected: torch.Tensor | None, found: torch.Tensor | None, largest: float) -> bool:
    """Whether two gradients are equal but for rounding beside the largest one, as each gradient is summed from those.

    That of a bias before a batch norm is 0 but for that, and of a weight by channel almost so; a missing one is 0.
    """
    given = [gradient for gradient in (expected, found) if gradient is not None]
    if not given or not math.isfinite(largest):
        return not given
    difference = given[0] if len(given) == 1 else given[0] - given[1]
    return _largest(difference) <= _GRADIENT_ROUNDING * max(torch.finfo(g.dtype).eps for g in given) * largest


def _dense(gradient: torch.Tensor) -> torch.Tensor:
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def _largest(gradient: torch.Tensor) -> float:
    dense = _dense(gradient)
    return dense.abs().max().item() if dense.numel() else 0.0


def _is_resized(expected: Any, found: Any) -> bool:
    """Whether two values are of one kind, and differ in a size or are counts that do."""
    if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        alike = expected.dim() == found.dim() and expected.dtype == found.dtype
        return alike and expected.shape != found.shape
    return type(expected) is type(found) is int and expected != found


def _with_nan_of(value: Any, other: Any) -> Any:
    if not all(isinstance(each, torch.Tensor) and each.layout is torch.strided for each in (value, other)):
        return value
    if value.shape != other.shape or value.is_quantized or not (value.is_floating_point() or value.is_complex()):
        return value
    unknown = other.isnan()
    return value.masked_fill(unknown, math.nan) if unknown.any() else value


def _value_difference(
    expected: Any, found: Any, promise: Promise, dtypes: Set[torch.dtype], what: str, *, widened: bool
) -> Difference:
    if not isinstance(expected, torch.Tensor) or not isinstance(found, torch.Tensor):
        same = type(expected) is type(found) and (expected is found or bool(expected == found))
        if widened and isinstance(expected, torch.dtype) and expected in _WIDE and isinstance(found, torch.dtype):
            same = True
        if any(isinstance(expected, kind) and isinstance(found, kind) for kind in (float, complex)):
            same = same or (cmath.isnan(expected) and cmath.isnan(found))
            finite = cmath.isfinite(expected) and cmath.isfinite(found)
            error = 0.0 if same else abs(expected - found) / (abs(expected) or 1.0) if finite else math.inf
            return Difference(error, _allowed(promise, {torch.float32, *dtypes}), _named(what, error))
        return Difference(0.0 if same else float("inf"), 0.0, f"{what} is {found!r} in place of {expected!r}")
    if expected.shape != found.shape:
        return Difference(float("inf"), 0.0, f"{what} has shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    floating = found.is_floating_point() or found.is_complex()
    if expected.dtype != found.dtype and not (widened and floating and expected.dtype in _WIDE):
        return Difference(float("inf"), 0.0, f"{what} is {found.dtype} in place of {expected.dtype}")
    # A rewrite may let ties of whole numbers fall otherwise, and not move all of them by a little.
    error = (relative_error if floating or widened else share_of_others)(expected, found)
    return Difference(error, _allowed(promise, {found.dtype, *dtypes}), _named(what, error))


def _named(what: str, error: float) -> str:
    """Which value differs, with how where no number says it."""
    return f"{what} is NaN, infinite or 0 throughout in one of the two alone" if math.isinf(error) else what


def _allowed(promise: Promise, dtypes: Set[torch.dtype]) -> float:
    """What is not judged may be any finite error."""
    if promise is Promise.CHANGES:
        return sys.float_info.max
    return 0.0 if promise is Promise.EXACT else max(TOLERANCE.get(dtype, 0.0) for dtype in dtypes)
