"""Parts of a fused weight: q, k and v of one projection, or any range of its outputs."""

from __future__ import annotations

import re

from fxopt.errors import SpecError

_THIRDS = ("q", "k", "v")


def check_slice(text: str) -> None:
    """Refuse what is no slice.

    Raises:
        SpecError: with what would be one.
    """
    numbers = re.fullmatch(r"(\d+)-(\d+)", text)
    if text not in _THIRDS and (numbers is None or int(numbers[1]) >= int(numbers[2])):
        raise SpecError(f"lora: 'slices' holds '{text}', expected q, k, v, or a range of outputs like 0-768")


def ranges(text: str, rows: int) -> tuple[int, int]:
    """First output and the one behind the last: thirds for q, k and v."""
    if text in _THIRDS:
        third = rows // 3
        return third * _THIRDS.index(text), third * (_THIRDS.index(text) + 1)
    low, _, high = text.partition("-")
    return int(low), int(high)
