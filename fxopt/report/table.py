"""A report for the terminal: plain text, 100 columns, ASCII but for the user's own words."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from tabulate import tabulate

from fxopt.report.section import Section, Table

_WIDTH = 100
_INDENT = "  "


def table(sections: Sequence[Section]) -> str:
    """The whole report as text, without colours."""
    return "\n\n".join("\n".join(_lines(section)) for section in sections) + "\n"


def _lines(section: Section) -> Iterator[str]:
    yield section.title
    column = max((len(label) for label, _ in section.facts), default=0)
    for label, text in section.facts:
        yield from _wrapped(f"{_INDENT}{label:<{column}}  ", text)
    if section.table is not None:
        yield textwrap.indent(_grid(section.table), _INDENT)
    for note in section.notes:
        yield from _wrapped(f"{_INDENT}note: ", note)


def _grid(content: Table) -> str:
    align = ["right" if index in content.right else "left" for index in range(len(content.headings))]
    text = tabulate(content.rows, content.headings, tablefmt="simple", colalign=align, disable_numparse=True)
    return "\n".join(line.rstrip() for line in text.splitlines())


def _wrapped(start: str, text: str) -> list[str]:
    lines = textwrap.wrap(
        text,
        width=_WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return lines or [start.rstrip()]
