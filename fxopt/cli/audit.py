"""`fxopt audit`: find faults in models, at the user's own lines."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from fxopt.cli.options import Debug, InputTexts, Quiet
from fxopt.cli.outputs import Output
from fxopt.cli.progress import progress
from fxopt.cli.stdout import kept_for_the_report


class Style(enum.StrEnum):
    """The form of the report."""

    TEXT = "text"
    JSON = "json"
    SARIF = "sarif"
    JUNIT = "junit"
    MARKDOWN = "markdown"
    GITHUB = "github"


class FailOn(enum.StrEnum):
    """The mildest finding that fails the command."""

    ERROR = "error"
    WARNING = "warning"
    NEVER = "never"


def audit(
    targets: Annotated[
        list[str] | None,
        typer.Argument(help="model.py, model.py:Name, package.module or package.module:name.", metavar="TARGET..."),
    ] = None,
    inputs: InputTexts = None,
    style: Annotated[Style, typer.Option("--format", help="How to print.")] = Style.TEXT,
    fail_on: Annotated[FailOn, typer.Option(help="Exit with 1 at findings as bad as this.")] = FailOn.ERROR,
    baseline: Annotated[Path | None, typer.Option(help="Accept the findings listed there.", metavar="FILE")] = None,
    write_baseline: Annotated[
        Path | None, typer.Option(help="List the findings there, for `--baseline`.", metavar="FILE")
    ] = None,
    fix: Annotated[bool, typer.Option("--fix", help="Show the safe fixes as a diff.")] = False,
    write: Annotated[bool, typer.Option("--write", help="With --fix: write them to the files.")] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Print activations, gradients and gains of each layer, too.")
    ] = False,
    rules: Annotated[bool, typer.Option("--rules", help="List all rules.")] = False,
    explain: Annotated[str | None, typer.Option(help="Explain a rule.", metavar="RULE")] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Find what is wrong with a model, each fault at your own line.

    Faults of buffers, devices, registration, numerics, training and deployment.
    """
    if write and not fix:
        raise typer.BadParameter("goes with --fix", param_hint="--write")
    if not targets and not rules and explain is None:
        raise typer.BadParameter("name a model, or ask for --rules or --explain RULE", param_hint="TARGET")
    from fxopt.findings import Baseline, catalog, patch, render, search
    from fxopt.findings.render import layers as table

    cards = catalog.cards()
    if rules or explain is not None:
        typer.echo(catalog.listed(cards) if rules else catalog.explained(cards, explain or ""))
        return
    kept = None if write_baseline is None else Output("--write-baseline", write_baseline, Baseline.written)
    if kept is not None:
        kept.check()
    with progress(quiet) as stage, kept_for_the_report():
        found = search.search(targets or [], inputs or [], baseline, stage)
    texts = patch.patched(found.findings) if fix else {}
    # A format for machines stays whole on stdout; the diff goes beside it.
    typer.echo(render(found, cards, style.value), nl=False)
    if layers:
        typer.echo("\n" + table(found.layers), nl=False, err=style is not Style.TEXT)
    if fix:
        typer.echo(patch.diff(texts) or "nothing to fix by itself\n", nl=False, err=style is not Style.TEXT)
    if write:
        patch.write(texts)
    if kept is not None and not kept.write(found):
        raise typer.Exit(2)
    if fail_on is not FailOn.NEVER and search.fails(found, fail_on.value):
        raise typer.Exit(1)
