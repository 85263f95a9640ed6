"""`fxopt explain`: what capture makes of a target."""

from __future__ import annotations

import enum
from typing import Annotated

import typer

from fxopt.cli.options import Debug, InputTexts, TargetName, Train, Weights
from fxopt.cli.stdout import kept_for_the_report


class Form(enum.StrEnum):
    """Text to read, Markdown to paste, JSON to read by machine, or a drawing for Graphviz."""

    TEXT = "text"
    MARKDOWN = "markdown"
    JSON = "json"
    DOT = "dot"


def explain(
    target: TargetName,
    inputs: InputTexts = None,
    weights: Weights = None,
    form: Annotated[Form, typer.Option("--format", help="How to print.")] = Form.TEXT,
    fake: Annotated[bool, typer.Option("--fake", help="Capture without values, for models too large to run.")] = False,
    train: Train = False,
    debug: Debug = False,
) -> None:
    """Show the graph of a model by module, and what is not in it.

    With the reasons, and with what it assumes of the inputs.
    """
    # What the user's code prints is no part of the answer.
    with kept_for_the_report():
        from fxopt.capture import capture
        from fxopt.explain import explain as explained
        from fxopt.explain import render
        from fxopt.target import load

        loaded = load(target, inputs=inputs or (), weights=weights, train=train)
        captured = capture(loaded.module, loaded.inputs, fake=fake)
        text = render(explained(captured, loaded.name, loaded.module, loaded.notes), form.value)
    typer.echo(text, nl=False)
