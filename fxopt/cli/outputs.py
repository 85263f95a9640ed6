"""Files that a command leaves: looked at before it begins, and written once its report is printed."""

from __future__ import annotations

from collections.abc import Callable
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
        text: makes it of a record, or of whatever `write` is given.
        append: to what the file holds already.
    """

    flag: str
    path: Path
    text: Callable[[Any], str]
    append: bool = False

    def check(self) -> None:
        """Refuse, before there is something to lose, what could not be written.

        Raises:
            GateError: where the directory is missing, or the file is one.
        """
        if self.path.is_dir():
            raise GateError(f"{self.flag}: '{self.path}' is a directory: expected a file to write")
        if not self.path.parent.is_dir():
            raise GateError(f"{self.flag}: there is no directory '{self.path.parent}' for '{self.path}': make it first")

    def write(self, record: Any) -> bool:
        """Write it; False, with the reason on stderr, where that fails."""
        text = self.text(record)  # which may read what the file holds
        try:
            with self.path.open("a" if self.append else "w", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            typer.echo(f"fxopt: {self.flag}: cannot write '{self.path}': {error.strerror}", err=True)
            return False
        return True
