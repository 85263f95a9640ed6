"""`fxopt explain`: what capture makes of a target."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from fxopt.cli.stdout import kept_for_the_report


class Form(enum.StrEnum):
    """Text to read, Markdown to paste, JSON to read by machine, or a drawing for Graphviz."""

    TEXT = "text"
    MARKDOWN = "markdown"
    JSON = "json"
    DOT = "dot"


def explain(
    target: Annotated[
        str, typer.Argument(help="model.py, model.py:Name, package.module or package.module:name.", metavar="TARGET")
    ],
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="1x3x224x224, or ids=1x128:int64:0..30000; repeatable.", metavar="INPUT"),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Load these weights first: safetensors or a saved state_dict.", metavar="FILE")
    ] = None,
    form: Annotated[Form, typer.Option("--format", help="How to print.")] = Form.TEXT,
    fake: Annotated[bool, typer.Option("--fake", help="Capture without values, for models too large to run.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Keep the module in the mode its file left it in.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Show the graph of a model by module, what is not in it and why, and what it assumes of the inputs."""
    # What the user's code prints is no part of the answer.
    with kept_for_the_report():
        from fxopt.capture import capture
        from fxopt.explain import explain as explained
        from fxopt.explain import render
        from fxopt.target import load

        loaded = load(target, inputs=inputs or (), weights=weights, train=train)
        captured = capture(loaded.module, loaded.inputs.args, loaded.inputs.kwargs, fake=fake)
        text = render(explained(captured, loaded.name, loaded.module, loaded.notes), form.value)
    typer.echo(text, nl=False)
