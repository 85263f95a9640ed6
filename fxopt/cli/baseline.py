"""`fxopt baseline`: measurements that are kept, and what became of them."""

from __future__ import annotations

import datetime
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from fxopt.cli.numbers import seconds
from fxopt.cli.options import MOST_THREADS, Debug, Format, InputTexts, Quiet, Style, TargetName
from fxopt.cli.progress import progress
from fxopt.cli.stdout import kept_for_the_report

app = typer.Typer(
    help="Keep measurements, and hold new ones against them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

DeviceName = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:1.")]
Threads = Annotated[int, typer.Option(help="Threads of torch on the CPU.", min=1, max=MOST_THREADS)]
Budget = Annotated[float, typer.Option(help="Time to measure: `10s`.", parser=seconds, metavar="SECONDS")]
StoreFile = Annotated[Path, typer.Option("--file", help="The file of baselines.", metavar="FILE")]
Branch = Annotated[
    str | None, typer.Option("--branch", help="Keep them on this git branch instead of a file.", metavar="NAME")
]

_FILE = Path("fxopt-baselines.jsonl")


@app.command()
def save(
    target: TargetName,
    inputs: InputTexts = None,
    device: DeviceName = "cpu",
    threads: Threads = 1,
    budget: Budget = 10.0,
    file: StoreFile = _FILE,
    branch: Branch = None,
    dirty: Annotated[bool, typer.Option("--allow-dirty", help="Though there are uncommitted changes.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a model and keep the result under the commit of the working tree."""
    from fxopt.errors import GateError
    from fxopt.gate.revision import Repository

    repository = Repository.here()
    # The file that this very command writes does not count.
    changes = repository.uncommitted(None if branch else file.absolute().parent.resolve() / file.name)
    if changes and not dirty:
        raise GateError(
            f"the working tree has uncommitted changes ('{changes[0]}'), and a baseline stands for a commit: commit "
            "them, or `--allow-dirty`"
        )
    commit = repository.resolve("HEAD")
    now = _measured(target, inputs, device, threads, budget, commit, quiet)
    _store(file, branch).append(json.dumps(now))
    typer.echo(f"kept {now['median_ms']:.4g} ms for {commit[:7]} {f'on branch {branch}' if branch else f'in {file}'}")


@app.command()
def compare(
    target: TargetName,
    inputs: InputTexts = None,
    device: DeviceName = "cpu",
    threads: Threads = 1,
    budget: Budget = 10.0,
    fail_over: Annotated[str, typer.Option(help="Slow-down from which it fails.", metavar="SHARE")] = "10%",
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 4 where it is inconclusive.")] = False,
    file: StoreFile = _FILE,
    branch: Branch = None,
    style: Style = Format.TABLE,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure a model and hold it against the newest baseline of an equal machine.

    Exit codes: 0 fine, 2 wrong call, 3 regression, 4 inconclusive (with --strict), 5 nothing to compare with.
    """
    from fxopt import gate, report
    from fxopt.gate import baseline
    from fxopt.gate.revision import Repository

    threshold = gate.limit("latency", fail_over, "--fail-over")
    commit = Repository.here().resolve("HEAD")
    now = _measured(target, inputs, device, threads, budget, commit, quiet)
    history = baseline.entries(_store(file, branch), target, device)
    then = baseline.last_comparable(history, now)
    verdict = baseline.judge_stored(then, now, threshold)
    record = baseline.record(target, [then, now], verdict=verdict, threshold=threshold)
    typer.echo(report.render(record, style.value), nl=False)
    raise typer.Exit(3 if verdict == "REGRESSION" else 4 if strict and verdict == "INCONCLUSIVE" else 0)


@app.command()
def history(
    target: TargetName,
    device: DeviceName = "cpu",
    file: StoreFile = _FILE,
    branch: Branch = None,
    style: Style = Format.TABLE,
    debug: Debug = False,
) -> None:
    """Show all baselines of a model, those of other machines marked, with the band that is noise."""
    from fxopt import report
    from fxopt.gate import baseline

    found = baseline.entries(_store(file, branch), target, device)
    if not found:
        from fxopt.errors import BaselineError

        where = f"in {file}" if branch is None else f"on the branch '{branch}'"
        raise BaselineError(f"'{target}' has no baseline on {device} {where}: `fxopt baseline save` makes one")
    comparable = [one for one in found if not baseline.differences(one, found[-1])]
    shown = [one | {"differs": baseline.differences(one, found[-1])} for one in found]
    record = baseline.record(target, shown, band=baseline.noise_band(comparable))
    typer.echo(report.render(record, style.value), nl=False)


def _measured(
    target: str, inputs: list[str] | None, device: str, threads: int, budget: float, commit: str, quiet: bool
) -> dict[str, Any]:
    with progress(quiet) as stage, kept_for_the_report():
        stage("load")
        import torch

        from fxopt.bench import fingerprint, measure_latency, measure_size
        from fxopt.evaluation import evaluated
        from fxopt.gate import baseline
        from fxopt.record import plain
        from fxopt.target import load

        torch.manual_seed(0)
        loaded = load(target, inputs=inputs or ())
        stage(f"latency on {device}")
        latency = measure_latency(loaded.module, loaded.inputs, device, budget_seconds=budget, threads=threads)
        size = asdict(measure_size(loaded.module, loaded.inputs, device))
        metrics = None if loaded.evaluate is None else evaluated(loaded.evaluate, loaded.module)
        machine = plain(asdict(fingerprint(device)))
        moment = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        described = loaded.inputs.describe()
        return baseline.entry(target, described, commit, moment, machine, latency, size, plain(metrics))


def _store(file: Path, branch: str | None) -> Any:
    from fxopt.gate import baseline
    from fxopt.gate.revision import Repository

    return baseline.FileStore(file) if branch is None else baseline.BranchStore(Repository.here().root, branch)
