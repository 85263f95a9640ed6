"""The gate: jobs, one after the other, each the head against the base."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fxopt.bench.device import unavailable
from fxopt.bench.fingerprint import fingerprint
from fxopt.errors import BaselineError, FxoptError, GateError, VerifyError, WorkerError
from fxopt.gate import lock
from fxopt.gate.cause import find_cause
from fxopt.gate.checks import all_checks
from fxopt.gate.environment import environment
from fxopt.gate.journal import Journal
from fxopt.gate.processes import Checkout, Launcher, Worker
from fxopt.gate.revision import Repository, compare_with
from fxopt.gate.settings import Job
from fxopt.gate.verdict import GateVerdict, advice, judge_windows, wants_another
from fxopt.gate.window import Window, joined, take_window
from fxopt.record import SCHEMA, plain

EXIT_CODES = {"failed": 1, "wrong call": 2, "REGRESSION": 3, "not comparable": 5, "INCONCLUSIVE": 0}
"""By the verdict on a target, the worst first; INCONCLUSIVE is 4 where the gate is strict."""

_WINDOWS = 3
_CAUSE_SHARE = 4
"""A comparison that looks for the cause gets one part in so many of the budget."""
_LEAST_FOR_CAUSE = 1.0
"""Seconds."""


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
    """

    jobs: tuple[Job, ...]
    base: str
    root: Path
    python: str | None = None
    fresh: bool = False
    find_causes: bool = True


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
        GateError: outside of a repository, or for a revision that is not there.
        BaselineError: where base and head have no common history.
    """
    tell = progress or (lambda stage: None)
    repository = Repository.here()
    commit = compare_with(repository, plan.base)
    changes = repository.changes()
    head = repository.resolve("HEAD")
    known = lock.read(plan.root / lock.FILE) or {}
    machine = plain(asdict(fingerprint()))
    key = _digest([head, changes, commit, machine, known, plan.find_causes])
    found: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        journal = Journal(repository.private("fxopt-ci.jsonl"), key, fresh=plan.fresh)
        sides: tuple[Launcher, Checkout, Checkout] | None = None
        for number, job in enumerate(plan.jobs, 1):
            name = f"{number}/{len(plan.jobs)} {job.name}" if len(plan.jobs) > 1 else job.name
            earlier = journal.get(asdict(job))
            if earlier is not None:
                tell(f"{name}: found by the run before")
                found.append(earlier)
                continue
            if sides is None:
                tell(f"check out {commit[:7]}")
                sides = stack.enter_context(_both_sides(repository, commit, plan, tell, launcher))
            one = _Job(job, *sides, files=repository.changed_files(commit), locked=known.get(job.name))
            result = one.run(plan.find_causes, lambda stage, name=name: tell(f"{name}: {stage}"))  # type: ignore[misc]
            journal.add(asdict(job), result)
            found.append(result)
        journal.remove()
    return {
        "schema": SCHEMA,
        "kind": "ci",
        "base": {"revision": plan.base, "commit": commit},
        "head": {"commit": head, "dirty": bool(changes)},
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
        )
        if not base.directory.is_dir():
            raise BaselineError(f"'{repository.below}' is not in {base.label}: there is nothing to compare with")
        yield launcher, base, Checkout("head", "head", repository.root / repository.below)


class _Job:
    """One job at work."""

    def __init__(
        self,
        job: Job,
        launcher: Launcher,
        base: Checkout,
        head: Checkout,
        files: Sequence[str],
        locked: lock.Counts | None,
    ):
        self._job = job
        self._launcher = launcher
        self._checkouts = {"base": base, "head": head}
        self._files = files
        self._locked = locked
        self._kept = {side: str(launcher.directory / f"{side}.pt") for side in self._checkouts}

    def run(self, find_causes: bool, tell: Callable[[str], None]) -> dict[str, Any]:
        """The part of the record on this job; errors become its verdict."""
        began = time.perf_counter()
        found: dict[str, Any] = {"name": self._job.name, "target": self._job.target, "device": self._job.device}
        found |= {"spec": self._job.passes, "threads": self._job.threads, "threshold": self._job.limits.latency}
        found |= {"latency": None, "checks": [], "cause": None, "passes": [], "graphs": None, "notes": []}
        try:
            found |= self._gated(find_causes, tell)
        except FxoptError as error:
            verdicts: dict[type[FxoptError], str] = {VerifyError: "REGRESSION", BaselineError: "not comparable"}
            verdicts |= {WorkerError: "failed", FxoptError: "wrong call"}
            found["verdict"] = next(name for kind, name in verdicts.items() if isinstance(error, kind))
            found["notes"] = [str(error)]
        return found | {"seconds": time.perf_counter() - began}

    def _gated(self, find_causes: bool, tell: Callable[[str], None]) -> dict[str, Any]:
        job = self._job
        reason = unavailable(job.device)
        if reason is not None:
            raise GateError(f"cannot measure on '{job.device}': {reason}")
        facts = {}
        for side in ("base", "head"):
            tell(f"run and verify the {side}")
            with self._start(side, None, None, shared=side == "head") as worker:
                held = self._kept["base"] if side == "head" else None
                facts[side] = worker.ask("facts", keep=self._kept[side], held=held)
        checks = all_checks(facts["base"], facts["head"], job.limits, self._locked)
        failed = any(check.status == "failed" for check in checks)
        found: dict[str, Any] = {
            "verdict": "OK",
            "inputs": facts["head"]["inputs"],
            "checks": [asdict(check) for check in checks],
            "passes": facts["head"]["passes"],
            "graphs": {side: facts[side].get("graph") for side in facts},
        }
        if job.timed:
            found |= self._timed(facts, find_causes, tell)
        return found | ({"verdict": "REGRESSION"} if failed else {})

    def _timed(self, facts: Mapping[str, Any], find_causes: bool, tell: Callable[[str], None]) -> dict[str, Any]:
        job = self._job
        windows = self._windows(tell)
        window = joined(windows)
        verdict = judge_windows(windows, job.limits.latency)
        notes = advice(window, job.limits.latency, job.threads) if verdict is GateVerdict.INCONCLUSIVE else []
        cause = None
        if verdict is GateVerdict.REGRESSION and find_causes:
            cause = find_cause(
                lambda side, stages, changes: functools.partial(self._start, side, stages, changes),
                window.effect.ratio,
                facts["base"]["passes"],
                facts["head"]["passes"],
                self._files,
                max(job.budget / _CAUSE_SHARE, _LEAST_FOR_CAUSE),
                tell,
            )
        latency = _latency(window, len(windows), verdict)
        return {"verdict": str(verdict), "latency": latency, "cause": cause, "notes": notes}

    def _windows(self, tell: Callable[[str], None]) -> list[Window]:
        starts = {side: functools.partial(self._start, side, None, None) for side in self._checkouts}
        threshold, windows = self._job.limits.latency, list[Window]()
        while not windows or wants_another(windows, threshold, _WINDOWS):
            tell("time base and head in turns" if not windows else f"time them again: window {len(windows) + 1}")
            seed, budget = len(windows), self._job.budget / _WINDOWS
            windows.append(take_window(starts, budget=budget, tight=threshold, seed=seed))
        return windows

    def _start(self, side: str, stages: int | None, changes: int | None, shared: bool = True) -> Worker:
        job = self._job
        order = {
            "target": job.target,
            "inputs": list(job.inputs),
            "weights": job.weights,
            "passes": job.passes,
            "device": job.device,
            "threads": job.threads,
            "stages": stages,
            "changes": changes,
            "shared": self._kept["base"] if shared else None,
        }
        return self._launcher.start(self._checkouts[side], order)


def _latency(window: Window, windows: int, verdict: GateVerdict) -> dict[str, Any]:
    effect, noise = window.effect, window.noise
    times = {side: [round(time, 9) for time in window.times(side)] for side in ("base", "head", "again")}
    return {
        "verdict": str(verdict),
        "base_ms": 1e3 * sorted(times["base"])[len(times["base"]) // 2],
        "head_ms": 1e3 * sorted(times["head"])[len(times["head"]) // 2],
        "ratio": effect.ratio,
        "low": effect.low,
        "high": effect.high,
        "noise_floor": noise.reach,
        "pairs": len(times["base"]),
        "windows": windows,
        "processes": 3 * len(window.rounds),
        "calls": window.calls,
        "preempted": window.preempted,
        "clocks_mhz": window.clocks,
        "seconds": window.seconds,
        "measuring_seconds": window.measuring,
        "times": times,
    }


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
