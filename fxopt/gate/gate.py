"""The gate: jobs, one after the other, each the head against the base."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fxopt.bench.fingerprint import fingerprint
from fxopt.errors import BaselineError, GateError
from fxopt.gate import lock
from fxopt.gate.contest import Contest
from fxopt.gate.environment import environment, packages
from fxopt.gate.journal import Journal
from fxopt.gate.processes import Checkout, Launcher
from fxopt.gate.revision import Repository, compare_with
from fxopt.gate.settings import Job
from fxopt.record import SCHEMA, plain
from fxopt.target.source import split

EXIT_CODES = {"failed": 1, "wrong call": 2, "REGRESSION": 3, "new": 5, "not comparable": 5, "INCONCLUSIVE": 0}
"""By the verdict on a target, the worst first; INCONCLUSIVE is 4 where the gate is strict."""


@dataclass(frozen=True)
class Plan:
    """What a gate is to do.

    Attributes:
        jobs: in order.
        base: a revision.
        root: where the lock file is.
        python: the interpreter for the base; None finds out whether it needs one of its own.
        fresh: forget what an interrupted run has found already.
        find_causes: say what a regression comes from.
        update_lock: the lock file is about to be written anew: nothing is held to what it says.
    """

    jobs: tuple[Job, ...]
    base: str
    root: Path
    python: str | None = None
    fresh: bool = False
    find_causes: bool = True
    update_lock: bool = False


def run_gate(
    plan: Plan, progress: Callable[[str], None] | None = None, launcher: Launcher | None = None
) -> dict[str, Any]:
    """Hold the working tree against a revision, target by target.

    What one target finds is kept until all are done, so that a run that was stopped goes on where it was.

    Args:
        plan: what to do.
        progress: told what begins.
        launcher: starts the processes; None makes one for this run.

    Returns:
        The record: `kind` is "ci"; each of its `targets` has a `verdict`, `latency`, `checks` and `cause`.

    Raises:
        GateError: outside of a repository, for a target there, or for a revision that is not there.
        BaselineError: where base and head have no common history.
    """
    tell = progress or (lambda stage: None)
    repository = Repository.here()
    jobs = [_inside(repository, job) for job in plan.jobs]
    commit = compare_with(repository, plan.base)
    changes, uncommitted = repository.changes(), repository.uncommitted()
    head = repository.resolve("HEAD")
    known = {} if plan.update_lock else lock.read(plan.root / lock.FILE) or {}
    machine = plain(asdict(fingerprint()))
    key = _digest([head, changes, commit, machine, known, plan.find_causes])
    found: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        journal = Journal(repository.private("fxopt-ci.jsonl"), key, fresh=plan.fresh)
        sides: tuple[Launcher, Checkout, Checkout] | None = None
        for number, job in enumerate(jobs, 1):
            name = f"{number}/{len(jobs)} {job.name}" if len(jobs) > 1 else job.name
            earlier = journal.get(asdict(job))
            if earlier is not None:
                tell(f"{name}: found by the run before")
                found.append(earlier)
                continue
            if sides is None:
                tell(f"check out {commit[:7]}")
                sides = stack.enter_context(_both_sides(repository, commit, plan, tell, launcher))
            one = Contest(
                job,
                *sides,
                files=repository.changed_files(commit),
                locked=known.get(job.name),
                base_target=_in_base(repository, job.target, commit),
            )
            result = one.run(plan.find_causes, lambda stage, name=name: tell(f"{name}: {stage}"))  # type: ignore[misc]
            if EXIT_CODES.get(result["verdict"], 0) in (0, EXIT_CODES["REGRESSION"]):
                journal.add(asdict(job), result)  # what failed may be repaired by then, as by installing a package
            found.append(result)
        journal.remove()
    return {
        "schema": SCHEMA,
        "kind": "ci",
        "base": {"revision": plan.base, "commit": commit},
        "head": {
            "commit": head,
            "dirty": bool(changes),
            "uncommitted": uncommitted,
            "directory": repository.below.as_posix(),
        },
        "machine": machine,
        "targets": found,
    }


def exit_code(record: Mapping[str, Any], strict: bool) -> int:
    """0 fine, 1 the tool failed, 2 wrong call, 3 regression, 4 inconclusive where strict, 5 not comparable."""
    verdicts = {target["verdict"] for target in record["targets"]}
    code = next((code for verdict, code in EXIT_CODES.items() if verdict in verdicts and code), 0)
    return 4 if not code and strict and "INCONCLUSIVE" in verdicts else code


def lock_counts(record: Mapping[str, Any]) -> dict[str, lock.Counts]:
    """By target, how often each pass fired; only where the target was looked at."""
    return {target["name"]: lock.count(target["passes"]) for target in record["targets"] if target.get("passes")}


@contextlib.contextmanager
def _both_sides(
    repository: Repository, commit: str, plan: Plan, tell: Callable[[str], None], launcher: Launcher | None
) -> Iterator[tuple[Launcher, Checkout, Checkout]]:
    with contextlib.ExitStack() as stack:
        tree = stack.enter_context(repository.checked_out(commit))
        launcher = launcher or stack.enter_context(Launcher())
        python = plan.python or environment(repository, commit, tree, launcher.directory, tell)
        base = Checkout(
            "base",
            f"base {commit[:7]}",
            tree / repository.below,
            python=python,
            moved=((repository.root, tree),),
            foreign=repository.root,
            kept=tuple(path.resolve() for path in (Path(sys.prefix), *packages())),
        )
        try:
            # A folder that is new holds targets that are new, and may be left by `..` for one that is not.
            base.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BaselineError(f"'{repository.below}' is no directory in {base.label}: call from another") from error
        yield launcher, base, Checkout("head", "head", repository.root / repository.below)


def _inside(repository: Repository, job: Job) -> Job:
    """By a path that leads into both checkouts: an absolute one would be that of the head in either."""
    place, name = split(job.target)
    here = repository.root / repository.below
    path = Path(os.path.normpath(here / place))
    if not Path(place).is_absolute() and path.is_relative_to(repository.root):
        return job
    path = path.parent.resolve() / path.name
    if not path.is_relative_to(repository.root):
        raise GateError(
            f"'{job.target}' is outside of the repository '{repository.root}', which has no other revision of it: "
            "name a file inside"
        )
    target = os.path.relpath(path, here) + (f":{name}" if name else "")
    return replace(job, target=target, name=job.name.replace(job.target, target))


def _in_base(repository: Repository, target: str, commit: str) -> str:
    """A target by the path that its file had at a commit."""
    place, name = split(target)
    here = repository.root / repository.below
    old = repository.renamed_from(Path(os.path.normpath(here / place)), commit)
    return target if old is None else os.path.relpath(old, here) + (f":{name}" if name else "")


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
