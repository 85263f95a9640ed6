"""A share as a user writes it."""

from __future__ import annotations

import re

import typer


def share(text: str) -> float:
    """`0.5%` or `0.005` as a number from 0 to 1.

    Raises:
        BadParameter: for anything else.
    """
    found = re.fullmatch(r"(\d*\.?\d+)\s*(%?)", str(text).strip())
    value = float(found.group(1)) / (100 if found.group(2) else 1) if found else -1.0
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"{text!r} is no share; write 0.5%, or 0.005")
    return value
