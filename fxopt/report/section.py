"""The parts that every report is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Rows under headings.

    Attributes:
        headings: of the columns.
        rows: of texts.
        right: indices of the columns that line up on the right.
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[int, ...] = ()


@dataclass(frozen=True)
class Section:
    """One thing that a report tells.

    Attributes:
        title: heading.
        facts: pairs of a label and a text; an empty label carries the one before on.
        table: comes after the facts.
        notes: come last.
    """

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    table: Table | None = None
    notes: tuple[str, ...] = ()
