"""A time on a command line."""

from __future__ import annotations

import typer

from fxopt.seconds import seconds as written


def seconds(text: str) -> float:
    """`60`, `60s` or `1.5m` in seconds.

    Raises:
        BadParameter: for anything else, or less than 0.1 s.
    """
    try:
        return written(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
