"""`fxopt ci`: hold the working tree against a revision."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fxopt.cli.numbers import seconds
from fxopt.cli.options import MOST_THREADS, Debug, Format, InputTexts, Quiet, Style
from fxopt.cli.outputs import Output
from fxopt.cli.progress import progress
from fxopt.cli.stdout import kept_for_the_report


def ci(
    target: Annotated[
        str | None,
        typer.Argument(
            help="model.py, model.py:Name, package.module; left out: all of fxopt.toml, whose settings options replace."
        ),
    ] = None,
    base: Annotated[str, typer.Option(help="The revision that this change started from.", metavar="REV")] = "HEAD",
    passes: Annotated[str | None, typer.Option(help="What to do to both sides first.", metavar="SPEC")] = None,
    engine: Annotated[str | None, typer.Option(help="Run both sides by an engine.", metavar="NAME")] = None,
    inputs: InputTexts = None,
    weights: Annotated[Path | None, typer.Option(help="Load these weights into both sides.", metavar="FILE")] = None,
    fail_over: Annotated[
        str | None, typer.Option(help="Slow-down from which it fails.", metavar="SHARE", show_default="5%")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--max-memory-growth", help="Of a call.", metavar="SHARE", show_default="10%")
    ] = None,
    size: Annotated[
        str | None, typer.Option("--max-size-growth", help="Of the weights.", metavar="SHARE", show_default="10%")
    ] = None,
    metrics: Annotated[
        str | None, typer.Option("--max-metric-drop", help="Of `evaluate`.", metavar="NUMBER", show_default="0.01")
    ] = None,
    coverage: Annotated[
        str | None, typer.Option("--max-coverage-drop", help="Of the graph.", metavar="SHARE", show_default="1%")
    ] = None,
    output_error: Annotated[
        str | None, typer.Option("--max-output-error", help="Of the outputs with equal weights.", metavar="SHARE")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1.", show_default="cpu")] = None,
    threads: Annotated[
        int | None, typer.Option(help="Threads of torch on the CPU.", min=1, max=MOST_THREADS, show_default="1")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Time to measure a target: `20s`.", parser=seconds, metavar="SECONDS", show_default="20"),
    ] = None,
    latency: Annotated[
        bool | None,
        typer.Option(help="Measure the latency, or hold it to the other limits alone.", show_default="latency"),
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 4 where it is inconclusive.")] = False,
    find_cause: Annotated[bool, typer.Option(help="Say which pass and change a regression comes from.")] = True,
    update_lock: Annotated[bool, typer.Option("--update-lock", help="Write the matches to fxopt.lock.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what a stopped run has found.")] = False,
    base_python: Annotated[Path | None, typer.Option(help="Interpreter for the base.", metavar="FILE")] = None,
    style: Style = Format.TABLE,
    json_file: Annotated[Path | None, typer.Option("--json", help="Keep the record there.", metavar="FILE")] = None,
    junit_file: Annotated[Path | None, typer.Option("--junit", help="Write JUnit XML there.", metavar="FILE")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a page there.", metavar="FILE")] = None,
    history: Annotated[
        Path | None, typer.Option(help="Baselines to plot on the page: those of `fxopt baseline`.", metavar="FILE")
    ] = None,
    source_url: Annotated[
        str | None, typer.Option(help="Where lines of code are shown: https://.../{file}#L{line}.", metavar="URL")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Hold the working tree against a revision; fail if it is worse.

    By latency, accuracy, output error, memory, size, coverage and matches.

    Exit codes: 0 fine, 1 the tool failed, 2 wrong call, 3 regression, 4 inconclusive (with --strict), 5 nothing to
    compare with. In a GitHub workflow the report goes to the step summary and the failures become annotations.
    """
    for flag, given_for_page in (("--history", history), ("--source-url", source_url)):
        if given_for_page is not None and html_file is None:
            raise typer.BadParameter("goes with --html", param_hint=flag)
    from fxopt import gate, report, spec
    from fxopt.engines.table import find as find_engine
    from fxopt.errors import GateError
    from fxopt.gate.settings import FILE

    named = {"latency": ("--fail-over", fail_over), "memory": ("--max-memory-growth", memory)}
    named |= {"size": ("--max-size-growth", size), "metrics": ("--max-metric-drop", metrics)}
    named |= {"coverage": ("--max-coverage-drop", coverage), "output_error": ("--max-output-error", output_error)}
    limits = {key: gate.limit(key, text, flag) for key, (flag, text) in named.items() if text is not None}
    said = {"passes": passes, "engine": engine, "device": device, "threads": threads, "budget": budget}
    given: dict[str, Any] = {key: value for key, value in (said | {"timed": latency}).items() if value is not None}
    if target is not None:
        kept = None if weights is None else str(weights.resolve())
        name = f"{target} by {engine}" if engine else target
        jobs: tuple[gate.Job, ...] = (gate.Job(name, target, tuple(inputs or ()), weights=kept, **given),)
    elif inputs or weights is not None:
        raise GateError(f"--input and --weights are for one target: name it, or write them into '{FILE}'")
    else:
        jobs = gate.read_jobs(Path(FILE), given)
    jobs = tuple(replace(job, limits=replace(job.limits, **limits)) for job in jobs)
    files = _outputs(update_lock, json_file, junit_file)
    if html_file is not None:
        files.append(_page(html_file, history, source_url))
    for file in files:
        file.check()
    # A fork saves the import of torch, but its threads spin for long. The launcher forks this process, so it comes
    # before the progress, which has a thread.
    fork = all(job.threads == 1 for job in jobs)
    with (
        gate.stopping_cleanly(),
        gate.Launcher(fork=fork) as launcher,
        progress(quiet) as stage,
        kept_for_the_report(),
    ):
        for job in jobs:
            if job.passes:
                spec.parse(job.passes)
            if job.engine:
                find_engine(job.engine, {})
        python = None if base_python is None else str(base_python)
        plan = gate.Plan(jobs, base, Path.cwd(), python, fresh, find_cause, update_lock)
        record = gate.run_gate(plan, stage, launcher)
    if os.environ.get("GITHUB_ACTIONS") == "true":
        typer.echo(report.github(record), nl=False, err=style is not Format.TABLE)
    typer.echo(report.render(record, style.value), nl=False)
    written = [file.write(record) for file in files]
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        # Where a workflow runs this in a container, the file may be outside: the gate has its verdict all the same.
        Output("GITHUB_STEP_SUMMARY", Path(summary), lambda record: report.render(record, "markdown"), True).write(
            record
        )
    raise typer.Exit(gate.exit_code(record, strict) or (0 if all(written) else 2))


def _outputs(update_lock: bool, json_file: Path | None, junit_file: Path | None) -> list[Output]:
    """What is written of the record to files that a program reads."""
    from fxopt import gate, report
    from fxopt.gate.lock import FILE, updated

    lock, files = Path(FILE), list[Output]()
    if update_lock:
        files.append(Output("--update-lock", lock, lambda record: updated(lock, gate.lock_counts(record))))
    if json_file is not None:
        files.append(Output("--json", json_file, lambda record: report.render(record, "json")))
    if junit_file is not None:
        files.append(Output("--junit", junit_file, report.junit))
    return files


def _page(path: Path, history: Path | None, source_url: str | None) -> Output:
    """The page, with the libraries, the history and the URL that it needs."""
    from fxopt.gate import baseline
    from fxopt.report import page

    page.check(source_url)
    lines = [] if history is None else baseline.read(history)
    url = source_url or _github_url()
    return Output("--html", path, lambda record: page.page(record, lines, url))


def _github_url() -> str | None:
    """Where GitHub shows the commit that a workflow runs on."""
    parts = [os.environ.get(f"GITHUB_{name}") for name in ("SERVER_URL", "REPOSITORY", "SHA")]
    return "{}/{}/blob/{}/{{file}}#L{{line}}".format(*parts) if all(parts) else None
