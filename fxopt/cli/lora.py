"""`fxopt lora`: adapters as files. Show one, write that of a result in PEFT's format, merge one into the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from fxopt.cli.options import Debug, InputTexts, Weights
from fxopt.cli.stdout import kept_for_the_report

app = typer.Typer(help="Show, export and merge adapters.", no_args_is_help=True, pretty_exceptions_enable=False)

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Where the adapter, or the result, is.")]
TargetName = Annotated[
    str, typer.Option("--target", help="The original model: model.py, model.py:Name, package.module.", metavar="TARGET")
]
Out = Annotated[Path, typer.Option("--out", help="Where to write.", metavar="PATH")]
Name = Annotated[str, typer.Option("--adapter", help="Name of the adapter.", metavar="NAME")]


@app.command()
def show(
    directory: Directory,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    debug: Debug = False,
) -> None:
    """Show the options of an adapter and the layers that it is for."""
    found: dict[str, Any] = _lora().show(directory)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    from tabulate import tabulate

    for key in ("rank", "alpha", "rslora", "dora", "dropout", "parameters"):
        typer.echo(f"{key}: {found[key]}")
    rows = [
        [layer["name"], layer["rank"], f"{layer['scale']:.4g}", layer["a"], layer["b"]] for layer in found["layers"]
    ]
    typer.echo(tabulate(rows, ["layer", "rank", "scale", "A", "B"], disable_numparse=True))


@app.command()
def export(directory: Directory, target: TargetName, out: Out, adapter: Name = "default", debug: Debug = False) -> None:
    """Write the adapter of a result, made by `fxopt run --out DIR`, in the format of PEFT."""
    with kept_for_the_report():
        from fxopt import artifact
        from fxopt.target import load

        _lora().save(artifact.load(directory, load(target).module), out, adapter)
    typer.echo(f"wrote {out}")


@app.command()
def merge(
    directory: Directory,
    target: TargetName,
    out: Out,
    inputs: InputTexts = None,
    weights: Weights = None,
    debug: Debug = False,
) -> None:
    """Merge an adapter into the weights of its model, compare the outputs, and write the weights as safetensors."""
    with kept_for_the_report():
        from safetensors.torch import save_file

        from fxopt.capture import capture
        from fxopt.target import load

        loaded = load(target, inputs=inputs or (), weights=weights)
        module = capture(loaded.module, loaded.inputs).module
        _lora().load(module, directory)
        _lora().merge(module, loaded.inputs)
        save_file(_lora().merged_weights(module, loaded.module), out)
    typer.echo(f"wrote {out}")


def _lora() -> Any:
    """The pass, found as any other is; it brings its functions for files along."""
    from fxopt import spec

    return spec.find("lora")
