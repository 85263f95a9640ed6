"""One job of a gate at work: its two sides, everything that is held against a limit, and the latency."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fxopt.bench.device import unavailable
from fxopt.errors import BaselineError, FxoptError, GateError, NewTargetError, VerifyError, WorkerError
from fxopt.gate import lock
from fxopt.gate.cause import find_cause
from fxopt.gate.checks import all_checks
from fxopt.gate.processes import Checkout, Launcher, Worker, prepare_all
from fxopt.gate.settings import Job
from fxopt.gate.verdict import GateVerdict, advice, judge_windows, wants_another
from fxopt.gate.window import Window, joined, take_window

_WINDOWS = 3
_CAUSE_SHARE = 4
"""A comparison that looks for the cause gets one part in so many of the budget."""
_LEAST_FOR_CAUSE = 1.0
"""Seconds."""


class Contest:
    """The head against the base: all that a job asks for."""

    def __init__(
        self,
        job: Job,
        launcher: Launcher,
        base: Checkout,
        head: Checkout,
        files: Sequence[str],
        locked: lock.Counts | None,
        base_target: str,
    ):
        self._job = job
        self._launcher = launcher
        self._checkouts = {"base": base, "head": head}
        self._files = files
        self._locked = locked
        self._targets = {"base": base_target, "head": job.target}
        self._sides: dict[str, Worker] = {}

    def run(self, find_causes: bool, tell: Callable[[str], None]) -> dict[str, Any]:
        """The part of the record on this job; errors become its verdict."""
        began = time.perf_counter()
        job = self._job
        found: dict[str, Any] = {"name": job.name, "target": job.target, "device": job.device, "spec": job.passes}
        found |= {"engine": job.engine, "threads": job.threads, "threshold": job.limits.latency}
        found |= {**dict.fromkeys(("inputs", "latency", "cause", "graphs")), "checks": [], "passes": [], "notes": []}
        try:
            self._gate(found, find_causes, tell)
        except FxoptError as error:
            verdicts: dict[type[FxoptError], str] = {VerifyError: "REGRESSION", NewTargetError: "new"}
            verdicts |= {BaselineError: "not comparable", WorkerError: "failed", FxoptError: "wrong call"}
            found["verdict"] = next(name for kind, name in verdicts.items() if isinstance(error, kind))
            found["notes"] = [str(error)]
        finally:
            for worker in self._sides.values():
                worker.close()
        if any(check["status"] == "failed" for check in found["checks"]):
            found["verdict"] = "REGRESSION"  # whatever became of measuring the latency behind it
        return found | {"seconds": time.perf_counter() - began}

    def _gate(self, found: dict[str, Any], find_causes: bool, tell: Callable[[str], None]) -> None:
        """Put into `found` what is found, as it is found."""
        job = self._job
        reason = unavailable(job.device)
        if reason is not None:
            raise GateError(f"cannot measure on '{job.device}': {reason}")
        tell("load base and head")
        self._load()
        tell("run and verify base and head")
        facts = self._facts()
        checks = all_checks(facts["base"], facts["head"], job.limits, self._locked, job.lower_is_better)
        found |= {
            "verdict": "OK",
            "inputs": facts["head"]["inputs"],
            "checks": [asdict(check) for check in checks],
            "passes": facts["head"]["passes"],
            "graphs": {side: facts[side].get("graph") for side in facts},
        }
        if job.timed:
            found |= self._timed(facts, find_causes, tell)

    def _timed(self, facts: Mapping[str, Any], find_causes: bool, tell: Callable[[str], None]) -> dict[str, Any]:
        job = self._job
        windows = self._windows(tell)
        window = joined(windows)
        verdict = judge_windows(windows, job.limits.latency)
        notes = advice(window, job.limits.latency, job.threads) if verdict is GateVerdict.INCONCLUSIVE else []
        cause = None
        if verdict is GateVerdict.REGRESSION and find_causes:
            try:
                cause = find_cause(
                    lambda side, stages, changes: functools.partial(self._start, side, stages, changes),
                    window.effect.ratio,
                    facts["base"]["passes"],
                    facts["head"]["passes"],
                    self._files,
                    max(job.budget / _CAUSE_SHARE, _LEAST_FOR_CAUSE),
                    tell,
                )
            except FxoptError as error:
                notes = [f"the cause was not found: {error}"]
        if self._targets["base"] != job.target:
            notes = [f"the base has it as '{self._targets['base']}'", *notes]
        latency = _latency(window, len(windows), verdict)
        return {"verdict": str(verdict), "latency": latency, "cause": cause, "notes": notes}

    def _windows(self, tell: Callable[[str], None]) -> list[Window]:
        if not self._job.engine:
            tell("build base and head")
            prepare_all(self._sides.values(), "build")
        starts = {side: functools.partial(self._start, side, None, None) for side in self._sides}
        threshold, windows = self._job.limits.latency, list[Window]()
        while not windows or wants_another(windows, threshold, _WINDOWS):
            tell("time base and head in turns" if not windows else f"time them again: window {len(windows) + 1}")
            seed, budget = len(windows), self._job.budget / _WINDOWS
            windows.append(take_window(starts, budget=budget, tight=threshold, seed=seed))
        return windows

    def _load(self) -> None:
        """Start a process of each side; all others are twins of these two."""
        job = self._job
        order = {
            "inputs": list(job.inputs),
            "passes": job.passes,
            "engine": job.engine,
            "device": job.device,
            "threads": job.threads,
        }
        # The head first, here and wherever both are asked: what neither can do is a wrong call, not a lack of the base.
        head, base = self._launcher.start(
            *(
                (self._checkouts[side], order | {"target": self._targets[side], "weights": self._weights(side)})
                for side in ("head", "base")
            )
        )
        self._sides = {"head": head, "base": base}
        inputs = str(self._launcher.directory / "inputs.pt")
        self._sides["base"].ask("give_inputs", keep=inputs)
        prepare_all(self._sides.values(), "take_inputs", kept=inputs)

    def _weights(self, side: str) -> str | None:
        """The file of weights of a side; that of the head where the revision has none, as where git ignores them."""
        if self._job.weights is None:
            return None
        own = self._checkouts[side].directory / self._job.weights
        return str(own if own.exists() else self._checkouts["head"].directory / self._job.weights)

    def _facts(self) -> dict[str, dict[str, Any]]:
        """What is known of each side but its latency, found by both at once."""
        kept = {side: str(self._launcher.directory / f"{side}.pt") for side in self._sides}
        with contextlib.ExitStack() as stack:
            workers = {side: stack.enter_context(self._launcher.twin(one)) for side, one in self._sides.items()}
            for side, worker in workers.items():
                worker.begin("facts", keep=kept[side])
            facts = {side: worker.answer() for side, worker in workers.items()}
            facts["head"]["output_error"] = workers["head"].ask("output_error", kept=kept["base"])
        return facts

    def _start(self, side: str, stages: int | None, changes: int | None) -> Worker:
        worker = self._launcher.twin(self._sides[side])
        # An engine is built by each process that is timed: what it holds does not survive a fork.
        if self._job.engine or (stages, changes) != (None, None):
            try:
                worker.prepare("build", stages=stages, changes=changes)
            except BaseException:
                worker.close()
                raise
        return worker


def _latency(window: Window, windows: int, verdict: GateVerdict) -> dict[str, Any]:
    effect, noise = window.effect, window.noise
    times = {side: [round(time, 9) for time in window.times(side)] for side in ("base", "head", "again")}
    return {
        "verdict": str(verdict),
        "base_ms": 1e3 * statistics.median(times["base"]),
        "head_ms": 1e3 * statistics.median(times["head"]),
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
