"""Loads targets, lets every inspector look at each, and takes out what is accepted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from fxopt.errors import LoadError, MissingError
from fxopt.findings.accept import Baseline, suppress
from fxopt.findings.catalog import inspectors
from fxopt.findings.finding import Severity
from fxopt.findings.inspection import Inspection, Subject
from fxopt.target import load
from fxopt.target.flags import read_flag
from fxopt.target.source import split


def search(
    targets: Sequence[str],
    inputs: Sequence[str] = (),
    baseline: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> Inspection:
    """What all inspectors find in all targets, without what comments and the baseline accept.

    Raises:
        LoadError: a target does not exist, or an input or the baseline can't be read.
    """
    tell = progress or (lambda stage: None)
    accepted = Baseline.read(baseline) if baseline is not None else None
    parts = []
    for target in targets:
        tell(f"audit {target}")
        subject, notes = subject_of(target, inputs)
        parts.append(Inspection(notes=notes))
        parts += [kind().inspect(subject) for kind in inspectors()]
    found = suppress(Inspection.joined(parts))
    return accepted.without_known(found) if accepted else found


def subject_of(target: str, inputs: Sequence[str] = ()) -> tuple[Subject, tuple[str, ...]]:
    """What there is to look at, and what is amiss with it.

    A file whose model cannot be made, or whose inputs can't be told, is still there to be read.

    Raises:
        LoadError: a target does not exist, or an input can't be read.
    """
    place, _ = split(target)
    path = Path(place)
    files = (str(path.resolve()),) if path.is_file() else ()
    for flag in inputs:
        read_flag(flag)  # one that can't be read is a wrong call, no matter what the file holds
    try:
        loaded = load(target, inputs=inputs, train=True)
    except MissingError:
        raise
    except LoadError as error:
        if not files or path.suffix != ".py":
            raise
        return Subject(target, None, None, files), (f"only the source of '{target}' was read: {error}",)
    return Subject(target, loaded.module, loaded.inputs, files), loaded.notes


def fails(found: Inspection, fail_on: str) -> bool:
    """Whether anything is as bad as `fail_on`, or worse."""
    return any(finding.severity.rank >= Severity(fail_on).rank for finding in found.findings)
