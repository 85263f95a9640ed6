"""The one model of a finding: what was found, where, how sure it is, and what to do about it."""

from __future__ import annotations

import enum
import os
from dataclasses import dataclass
from pathlib import Path


class Severity(enum.Enum):
    """How bad it is."""

    ERROR = "error"
    """The model computes the wrong thing, or fails where it will be used."""
    WARNING = "warning"
    """It will hurt sooner or later."""
    NOTE = "note"
    """Worth knowing."""

    @property
    def rank(self) -> int:
        """Higher is worse."""
        return (Severity.NOTE, Severity.WARNING, Severity.ERROR).index(self)


class Precision(enum.Enum):
    """How sure a rule is of what it says."""

    HIGH = "high"
    """It was seen to happen, or nothing else can be meant."""
    MEDIUM = "medium"
    """It depends on what the author meant."""
    LOW = "low"
    """A hint."""


@dataclass(frozen=True)
class Place:
    """A position in the user's source.

    Attributes:
        path: absolute.
        line: from 1.
        column: from 1.
        end_column: one past the last column; 0 where it is not known.
        note: what happened there, for a related place.
    """

    path: str
    line: int
    column: int = 1
    end_column: int = 0
    note: str = ""

    def shown(self) -> str:
        """The path as a report shows it: relative to where the command runs, with `/`."""
        return relative(self.path)

    def __str__(self) -> str:
        return f"{self.shown()}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Fix:
    """An edit that is safe to make: text put in the place of a span.

    Attributes:
        path: of the file.
        line: where the span begins.
        column: of that line, from 1.
        end_line: where it ends.
        end_column: one past its last column.
        text: what to put there.
        what: in a few words.
    """

    path: str
    line: int
    column: int
    end_line: int
    end_column: int
    text: str
    what: str


@dataclass(frozen=True)
class Finding:
    """One fault.

    Attributes:
        rule: id of the rule.
        severity: how bad it is.
        precision: how sure the rule is.
        message: what is wrong, with the names and values of this very case.
        place: the user's line; None where there is no source.
        module: qualified name of the module, "" for the root.
        related: other places that matter, such as where the tensor was made.
        advice: what to do.
        fix: the edit that does it, where one is safe.
    """

    rule: str
    severity: Severity
    precision: Precision
    message: str
    place: Place | None
    module: str = ""
    related: tuple[Place, ...] = ()
    advice: str = ""
    fix: Fix | None = None

    @property
    def order(self) -> tuple[str, int, int, str]:
        """By file, line, column and rule."""
        place = self.place
        return (place.shown(), place.line, place.column, self.rule) if place else ("", 0, 0, self.rule)


def relative(path: str) -> str:
    """`path` from the current directory where it lies inside, else as it is; always with `/`."""
    try:
        inside = Path(path).resolve().relative_to(Path.cwd())
    except ValueError:
        return path.replace(os.sep, "/")
    return inside.as_posix()
