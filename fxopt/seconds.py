"""A time as a user writes it."""

from __future__ import annotations

import re

_SHORTEST = 0.1


def seconds(text: str | float) -> float:
    """`60`, `60s` or `1.5m` in seconds.

    Raises:
        ValueError: for anything else, or less than 0.1 s.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([sm]?)", str(text).strip())
    value = float(found.group(1)) * (60 if found.group(2) == "m" else 1) if found else 0.0
    if value < _SHORTEST:
        raise ValueError(f"{text!r} is no time of at least {_SHORTEST} s; write 60s, or 2m")
    return value
