"""Values as JSON can hold them."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from typing import Any

from fxopt.record.shape import Number


def number(value: float) -> Number:
    """A float as JSON can hold it: "nan", "inf" or "-inf" where it is not finite."""
    return float(value) if math.isfinite(value) else str(float(value))


def plain(value: Any) -> Any:
    """Anything as JSON can hold it: enums by value, tuples and sets as lists, what else there is as its text."""
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if isinstance(value, float):
        return number(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(plain, value), key=str)
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value)
