"""Parts of a fused weight: q, k and v of one projection, or any range of its outputs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch

from fxopt.errors import SpecError
from passes.lora.forms import ConvTranspose, Embedding, Experts, Form

_THIRDS = ("q", "k", "v")


def check_slice(text: str) -> None:
    """Refuse what is no slice.

    Raises:
        SpecError: with what would be one.
    """
    numbers = re.fullmatch(r"(\d+)-(\d+)", text)
    if text not in _THIRDS and (numbers is None or int(numbers[1]) >= int(numbers[2])):
        raise SpecError(f"lora: 'slices' holds '{text}', expected q, k, v, or a range of outputs like 0-768")


def why_not_sliced(slices: Sequence[str], form: Form) -> str | None:
    """What keeps a weight from being adapted for these outputs alone; None if nothing does."""
    if isinstance(form, (Embedding, ConvTranspose, Experts)) or form.groups > 1:
        return "slices are rows of a weight, and its outputs are not"
    rows = form.shapes(1)[1][0]
    for text in slices:
        if text in _THIRDS and rows % 3:
            return f"slice '{text}' is a third, and it has {rows} outputs; give a range like 0-{rows // 2}"
        low, high = ranges(text, rows)
        if high > rows:
            return f"it has {rows} outputs, none from {low} to {high}"
    return None


def ranges(text: str, rows: int) -> tuple[int, int]:
    """First output and the one behind the last: thirds for q, k and v."""
    if text in _THIRDS:
        third = rows // 3
        return third * _THIRDS.index(text), third * (_THIRDS.index(text) + 1)
    low, _, high = text.partition("-")
    return int(low), int(high)


def mask_of(columns: Iterable[Sequence[int]], b: torch.Tensor) -> torch.Tensor:
    """1 where B may differ from zero: in each column from the first of two rows to before the second."""
    mask = torch.zeros_like(b)
    for column, (low, high) in enumerate(columns):
        mask[low:high, column] = 1
    return mask


def columns_of(mask: torch.Tensor) -> list[tuple[int, int]]:
    """What `mask_of` was given."""
    rows = [column.nonzero() for column in mask.flatten(1).T]
    return [(int(each.min()), int(each.max()) + 1) for each in rows]
