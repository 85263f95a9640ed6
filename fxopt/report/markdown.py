"""A report in GitHub's Markdown, for a step summary or a pull request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tabulate import tabulate

from fxopt.markdown import escaped
from fxopt.report.section import Section, Table


def markdown(sections: Sequence[Section]) -> str:
    """The whole report as Markdown."""
    blocks: list[str] = []
    for level, section in enumerate(sections):
        blocks.append(f"{'##' if level == 0 else '###'} {escaped(section.title)}")
        blocks += _blocks(section)
    return "\n\n".join(blocks) + "\n"


def _blocks(section: Section) -> Iterator[str]:
    if section.facts:
        yield "\n".join(_items(section.facts))
    if section.table is not None:
        yield _grid(section.table)
    if section.notes:
        yield "\n>\n".join(f"> {escaped(note)}" for note in section.notes)


def _items(facts: tuple[tuple[str, str], ...]) -> Iterator[str]:
    current = ""
    for label, text in facts:
        current = label or current
        yield f"- **{escaped(current)}:** {escaped(text)}"


def _grid(content: Table) -> str:
    align = ["right" if index in content.right else "left" for index in range(len(content.headings))]
    rows = [[escaped(cell) for cell in row] for row in content.rows]
    headings = [escaped(heading) for heading in content.headings]
    return tabulate(rows, headings, tablefmt="pipe", colalign=align, disable_numparse=True)
