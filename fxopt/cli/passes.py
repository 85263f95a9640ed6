"""`fxopt passes`: which passes there are, and the options of each."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from fxopt.cli.options import Format

if TYPE_CHECKING:
    from fxopt.spec import PassDescription


def passes(
    name: Annotated[str | None, typer.Argument(help="A pass, to see its options.")] = None,
    style: Annotated[Format, typer.Option("--format", help="How to print.")] = Format.TABLE,
) -> None:
    """List all passes, or describe one with its options."""
    from fxopt import registry, spec

    if name is None:
        described = [spec.describe(pass_class) for pass_class in registry.available().values()]
        typer.echo(_json(described) if style is Format.JSON else _all(described, style))
    else:
        one = spec.describe(spec.find(name))
        typer.echo(_json([one]) if style is Format.JSON else _one(one, style))


def _json(described: list[PassDescription]) -> str:
    return json.dumps([dataclasses.asdict(one) for one in described], indent=2)


def _all(described: list[PassDescription], style: Format) -> str:
    rows = [[one.name, one.summary, one.promise, ", ".join(o.name for o in one.options)] for one in described]
    return _table(["pass", "what it does", "promise", "options"], rows, style)


def _one(one: PassDescription, style: Format) -> str:
    heading = f"## {one.name}" if style is Format.MARKDOWN else one.name
    facts = [f"promise: {one.promise}"]
    facts += [f"after: {', '.join(one.after)}"] if one.after else []
    facts += [f"not with: {', '.join(one.conflicts)}"] if one.conflicts else []
    rows = [[o.name, o.type, "(required)" if o.default is None else o.default, o.help] for o in one.options]
    options = _table(["option", "type", "default", "what it is for"], rows, style) if rows else "It takes no options."
    return "\n\n".join([heading, one.doc, "\n".join(facts), options])


def _table(headers: list[str], rows: list[list[str]], style: Format) -> str:
    from tabulate import tabulate

    if style is Format.MARKDOWN:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
        return tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    return tabulate(rows, headers, tablefmt="simple", disable_numparse=True, maxcolwidths=[None, 60, None, 48])
