"""Times and shares on a command line."""

from __future__ import annotations

import re

import typer

from fxopt.seconds import seconds as written


def seconds(text: str) -> float:
    """`60`, `60s` or `1.5m` in seconds; a wrong call for anything else, or less than 0.1 s."""
    try:
        return written(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def share(text: str) -> float:
    """`0.5%` or `0.005` as a number from 0 to 1; a wrong call for anything else."""
    found = re.fullmatch(r"(\d*\.?\d+)\s*(%?)", str(text).strip())
    value = float(found.group(1)) / (100 if found.group(2) else 1) if found else -1.0
    if not 0 <= value <= 1:
        raise typer.BadParameter(f"{text!r} is no share; write 0.5%, or 0.005")
    return value
