"""Files that a command leaves: looked at before it begins, and written once its report is printed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from fxopt.errors import GateError


@dataclass(frozen=True)
class Output:
    """A file.

    Attributes:
        flag: the option that asks for it.
        path: where it goes.
        text: makes it of a record.
    """

    flag: str
    path: Path
    text: Callable[[Mapping[str, Any]], str]

    def check(self) -> None:
        """Refuse, before there is something to lose, what could not be written.

        Raises:
            GateError: where the directory is missing.
        """
        if not self.path.parent.is_dir():
            raise GateError(f"{self.flag}: there is no directory '{self.path.parent}' for '{self.path}': make it first")

    def write(self, record: Mapping[str, Any]) -> bool:
        """Write it; False, with the reason on stderr, where that fails."""
        try:
            self.path.write_text(self.text(record), encoding="utf-8")
        except OSError as error:
            typer.echo(f"fxopt: {self.flag}: cannot write '{self.path}': {error.strerror}", err=True)
            return False
        return True
