"""`fxopt run`: optimize a target, verify, measure, report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fxopt.cli.numbers import seconds, share
from fxopt.cli.options import (
    MOST_THREADS,
    Debug,
    Device,
    Format,
    InputTexts,
    Quiet,
    Seed,
    Style,
    TargetName,
    Train,
    Weights,
)
from fxopt.cli.progress import progress
from fxopt.cli.stdout import kept_for_the_report

DEFAULT_PASSES = "clean,fuse"


class Run(TyperCommand):
    """Lets `--prove` stand alone: click knows options with a value and options without, none that may have one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give it the value that it stands for."""
        return super().parse_args(ctx, ["--prove=pass" if arg == "--prove" else arg for arg in args])


def run(
    target: TargetName,
    passes: Annotated[
        str,
        typer.Option(help="What to do, in order: `fuse,qat{bits=8}`. `fxopt passes` lists them.", metavar="SPEC"),
    ] = DEFAULT_PASSES,
    inputs: InputTexts = None,
    weights: Weights = None,
    device: Annotated[Device, typer.Option(help="Where to measure the latency.")] = Device.ALL,
    style: Style = Format.TABLE,
    out: Annotated[
        Path | None, typer.Option(help="Keep the result there: report, weights, recipe and code.", metavar="DIR")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch on the CPU.", min=1, max=MOST_THREADS)] = None,
    seed: Seed = 0,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Lower the result: `openvino{precision=bf16}` for one, `auto` for the fastest, `all` to see them.",
            metavar="NAME",
        ),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(help="Relative error that an engine may have; else what each dtype allows.", min=0.0),
    ] = None,
    prove: Annotated[
        str | None,
        typer.Option(
            help="Keep a pass for speed only if it is measured to be faster; `--prove=match` so each of its changes.",
            metavar="[pass|match]",
        ),
    ] = None,
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Rank the layers that were quantised by what each costs alone.")
    ] = False,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Leave the costliest layers floats until `evaluate` loses no more than this: `0.5%` of its accuracy.",
            parser=share,
            metavar="SHARE",
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Time for measuring one device, for proving one pass, and for all engines: `60s`.",
            parser=seconds,
            metavar="SECONDS",
        ),
    ] = None,
    train: Train = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Rewrite a model by passes, each verified, and measure the gain.

    Its graph is captured, and the latency is measured before and after.
    """
    with progress(quiet) as stage:
        stage("load")
        # What the user's code prints is not part of the report.
        with kept_for_the_report():
            import torch

            from fxopt import artifact, report, spec
            from fxopt.optimize import optimize
            from fxopt.target import load

            pipeline = spec.parse(passes)
            if out is not None:
                artifact.check(out)
                out = out.absolute()  # a file may go to another directory while it is imported
            if threads is not None:
                torch.set_num_threads(threads)
            torch.manual_seed(seed)
            loaded = load(target, inputs=inputs or (), weights=weights, train=train)
            if threads is not None:
                torch.set_num_threads(threads)  # the file may have set others
            names = () if budget is None else ("budget_seconds", "engine_seconds", "prove_seconds")
            limits: dict[str, Any] = dict.fromkeys(names, budget)
            result = optimize(
                loaded.module,
                loaded.inputs,
                passes=pipeline,
                devices=device.names,
                evaluate=loaded.evaluate,
                calibration_data=loaded.calibration_data,
                target=loaded.name,
                progress=stage,
                seed=seed,
                notes=loaded.notes,
                engine=engine,
                max_error=max_error,
                prove=prove,
                sensitivity=sensitivity,
                max_drop=max_drop,
                **limits,
            )
            if out is not None:
                stage("save")
                renderings = {
                    "report.json": report.render(result.record, "json"),
                    "report.md": report.render(result.record, "markdown"),
                }
                artifact.save(result, out, renderings)
    typer.echo(report.render(result.record, style.value), nl=False)
