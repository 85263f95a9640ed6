"""A report for the terminal: plain text, 100 columns, ASCII but for the user's own words."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from tabulate import tabulate

from fxopt.report.section import Section, Table

_WIDTH = 100
_INDENT = "  "
_GAP = "  "
"""Between two columns of a grid."""
_NARROWEST = 12
"""Characters that are left of a column whose cells are broken into lines."""


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
    columns = [(heading + _GAP, *cells) for heading, *cells in zip(content.headings, *content.rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]  # as wide as tabulate makes them
    words = [[len(word) for cell in cells for word in cell.split()] for _, *cells in columns]
    least = [max(_NARROWEST, len(heading), *longest) for (heading, *_), longest in zip(columns, words, strict=True)]
    over = len(_INDENT + _GAP.join("." * width for width in widths)) - _WIDTH
    for column in sorted(range(len(widths)), key=lambda column: -widths[column]):
        cut = min(over, widths[column] - least[column])
        widths[column], over = widths[column] - max(cut, 0), over - max(cut, 0)
    rows = [["\n".join(_broken(cell, width)) for cell, width in zip(row, widths, strict=True)] for row in content.rows]
    text = tabulate(rows, content.headings, tablefmt="simple", colalign=align, disable_numparse=True)
    return "\n".join(line.rstrip() for line in text.splitlines())


def _wrapped(start: str, text: str) -> list[str]:
    return _broken(text, _WIDTH, start) or [start.rstrip()]


def _broken(text: str, width: int, start: str = "") -> list[str]:
    """Lines of so many characters; the first one begins so, the others below."""
    below = " " * len(start)
    return textwrap.wrap(
        text, width, initial_indent=start, subsequent_indent=below, break_long_words=False, break_on_hyphens=False
    )
