"""`fxopt bench`: everything that can be measured of one model."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated

import typer

from fxopt.cli.numbers import seconds
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

_MOST = 2**31
"""No batch has as many rows, no machine as many cores, and torch fails at larger numbers in words of its own."""


def _numbers(option: str, text: str, least: int) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isascii() and part.strip().isdigit() and least <= int(part) < _MOST for part in parts):
        raise typer.BadParameter(f"'{text}' is no list of numbers from {least}, such as 1,4,16", param_hint=option)
    return [int(part) for part in parts]


def bench(
    target: TargetName,
    inputs: InputTexts = None,
    weights: Weights = None,
    device: Annotated[Device, typer.Option(help="Where to measure.")] = Device.ALL,
    batches: Annotated[
        str, typer.Option("--batch", help="Batch sizes to measure the throughput at.", metavar="N,N")
    ] = "1,2,4,8,16,32",
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch within an operator.", min=1, max=MOST_THREADS)
    ] = None,
    interop: Annotated[
        int | None, typer.Option(help="Operators that torch may run at once.", min=1, max=MOST_THREADS)
    ] = None,
    pin: Annotated[
        str | None, typer.Option(help="Hold all threads to these cores while measuring.", metavar="CORE,CORE")
    ] = None,
    budget: Annotated[
        float, typer.Option(help="Time that measuring one device may take: `10s`.", parser=seconds, metavar="SECONDS")
    ] = 10.0,
    cold: Annotated[bool, typer.Option(help="Measure the start of a fresh process too.")] = True,
    style: Style = Format.TABLE,
    seed: Seed = 0,
    train: Train = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a model: how fast, how large, and where its time goes.

    Latency, throughput by batch size, cold start, memory, and the cost of its operators and modules.
    """
    sizes = _numbers("--batch", batches, 1)
    cores = None if pin is None else _numbers("--pin", pin, 0)
    with progress(quiet) as stage:
        stage("load")
        # What the user's code prints is not part of the report.
        with kept_for_the_report():
            import torch

            from fxopt import report
            from fxopt.bench import cold_start, set_interop_threads
            from fxopt.bench.survey import survey
            from fxopt.record import of_survey
            from fxopt.target import load

            if interop is not None:
                set_interop_threads(interop)
            torch.manual_seed(seed)
            directory = Path.cwd()  # a file may go to another one while it is imported
            loaded = load(target, inputs=inputs or (), weights=weights, train=train)
            start = functools.partial(
                cold_start,
                target,
                inputs=inputs or (),
                weights=weights,
                train=train,
                device="cuda" if device is Device.CUDA else "cpu",
                threads=threads,
                directory=directory,
            )
            found = survey(
                loaded,
                devices=device.names,
                batches=sizes,
                budget_seconds=budget,
                threads=threads,
                cores=cores,
                cold=start if cold else None,
                progress=stage,
            )
    typer.echo(report.render(of_survey(found), style.value), nl=False)
