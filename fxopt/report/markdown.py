"""A report in GitHub's Markdown, for a step summary or a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from tabulate import tabulate

from fxopt.report.section import Section, Table

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|~#])")


def markdown(sections: Sequence[Section]) -> str:
    """The whole report as Markdown."""
    blocks: list[str] = []
    for level, section in enumerate(sections):
        blocks.append(f"{'##' if level == 0 else '###'} {_escaped(section.title)}")
        blocks += _blocks(section)
    return "\n\n".join(blocks) + "\n"


def _blocks(section: Section) -> Iterator[str]:
    if section.facts:
        yield "\n".join(_items(section.facts))
    if section.table is not None:
        yield _grid(section.table)
    if section.notes:
        yield "\n>\n".join(f"> {_escaped(note)}" for note in section.notes)


def _items(facts: tuple[tuple[str, str], ...]) -> Iterator[str]:
    current = ""
    for label, text in facts:
        current = label or current
        yield f"- **{_escaped(current)}:** {_escaped(text)}"


def _grid(content: Table) -> str:
    align = ["right" if index in content.right else "left" for index in range(len(content.headings))]
    rows = [[_escaped(cell) for cell in row] for row in content.rows]
    headings = [_escaped(heading) for heading in content.headings]
    return tabulate(rows, headings, tablefmt="pipe", colalign=align, disable_numparse=True)


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))
