"""Measurements that are kept: JSON lines in a file or on a git branch, and what may be held against them."""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxopt.bench.latency import Latency
from fxopt.errors import BaselineError, GateError
from fxopt.gate.revision import git
from fxopt.record import SCHEMA

_DECIDING = (
    "cpu cpu_flags cpu_capability cores os torch blas onednn threads gpu gpu_memory_bytes gpu_driver cuda cudnn"
).split()
"""Facts of a fingerprint that have to agree before two latencies are compared."""
_VERSION = 1
_ENTRY = ("version", "target", "inputs", "device", "commit", "time", "machine", "median_ms", "low_ms", "high_ms")


@dataclass(frozen=True)
class FileStore:
    """A file."""

    path: Path

    def read(self) -> str:
        """All lines."""
        try:
            return self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            raise GateError(f"cannot read the baselines in '{self.path}': {error}") from error

    def append(self, line: str) -> None:
        """Add one."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            raise GateError(f"cannot write the baseline to '{self.path}': {error}") from error


@dataclass(frozen=True)
class BranchStore:
    """A file on a branch of its own, written without touching the working tree or the index."""

    root: Path
    branch: str
    name: str = "baselines.jsonl"

    def read(self) -> str:
        """All lines."""
        tip = self._tip()
        return git(self.root, "show", f"{tip}:{self.name}").stdout if tip else ""

    def append(self, line: str) -> None:
        """Add one, as a commit.

        Raises:
            GateError: where git can't, or the branch is checked out: the working tree and the index would lack it.
        """
        if f"branch refs/heads/{self.branch}" in self._git("worktree", "list", "--porcelain").splitlines():
            raise GateError(
                f"the branch '{self.branch}' is checked out, and a commit there would change it below the working "
                "tree: name one that is for baselines alone"
            )
        blob = self._git("hash-object", "-w", "--stdin", given=self.read() + line + "\n")
        old, parent = self._commit(f"refs/heads/{self.branch}"), self._tip()
        with tempfile.TemporaryDirectory(prefix="fxopt-index-") as directory:
            index = Path(directory) / "index"
            if parent:
                self._git("read-tree", parent, index=index)
            self._git("update-index", "--add", "--cacheinfo", f"100644,{blob.strip()},{self.name}", index=index)
            tree = self._git("write-tree", index=index).strip()
        parents = ["-p", parent] if parent else []
        commit = self._git("commit-tree", tree, *parents, "-m", "Add a baseline").strip()
        # The old value makes a second writer fail rather than undo the first.
        self._git("update-ref", f"refs/heads/{self.branch}", commit, old or "0" * 40)

    def _tip(self) -> str | None:
        """Its newest commit; that of a remote in a clone that has no such branch of its own yet."""
        found = self._commit(f"refs/heads/{self.branch}")
        for remote in self._git("remote").split() if found is None else ():
            found = found or self._commit(f"refs/remotes/{remote}/{self.branch}")
        return found

    def _commit(self, reference: str) -> str | None:
        return git(self.root, "rev-parse", "--verify", "--quiet", reference).stdout.strip() or None

    def _git(self, *arguments: str, given: str | None = None, index: Path | None = None) -> str:
        done = git(self.root, *arguments, given=given, index=index)
        if done.returncode != 0:
            raise GateError(f"git can't keep the baseline on the branch '{self.branch}': {done.stderr.strip()}")
        return done.stdout


Store = FileStore | BranchStore
"""Where baselines are kept."""


def entry(
    target: str,
    inputs: str,
    commit: str,
    moment: str,
    machine: Mapping[str, Any],
    latency: Latency,
    size: Mapping[str, Any],
    metrics: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """One line of a store."""
    return {
        "version": _VERSION,
        "target": target,
        "inputs": inputs,
        "device": latency.device,
        "commit": commit,
        "time": moment,
        "machine": {**machine, "threads": latency.threads},
        "median_ms": latency.median_ms,
        "low_ms": latency.low_ms,
        "high_ms": latency.high_ms,
        "percentiles": latency.percentiles,
        "calls": len(latency.times),
        "preempted": latency.preempted,
        "size": dict(size),
        "metrics": None if metrics is None else dict(metrics),
    }


def record(
    target: str,
    found: Sequence[Mapping[str, Any]],
    *,
    verdict: str | None = None,
    threshold: float | None = None,
    band: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """What a report on entries is rendered from: `kind` is "baseline"."""
    facts = {"target": target, "verdict": verdict, "threshold": threshold, "band": band}
    return {"schema": SCHEMA, "kind": "baseline", **facts, "entries": [dict(one) for one in found]}


def read(path: Path) -> list[dict[str, Any]]:
    """All entries of a file, oldest first.

    Raises:
        GateError: where there is no file, or for a line that is none of ours.
    """
    if not path.is_file():
        raise GateError(f"there is no file of baselines '{path}': `fxopt baseline save` makes one")
    return _all(FileStore(path))


def entries(store: Store, target: str, device: str) -> list[dict[str, Any]]:
    """Those of one target on one device, oldest first.

    Raises:
        GateError: for a line that is none of ours.
    """
    return [one for one in _all(store) if one["target"] == target and one["device"] == device]


def _all(store: Store) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(store.read().splitlines(), 1):
        if not line.strip():
            continue
        one: Any = None
        with contextlib.suppress(ValueError):
            one = json.loads(line)
        if not isinstance(one, dict) or any(key not in one for key in _ENTRY) or one["version"] != _VERSION:
            raise GateError(f"line {number} of the baselines is none that this fxopt can read: {line[:60]!r}")
        found.append(one)
    return found


def differences(one: Mapping[str, Any], two: Mapping[str, Any]) -> list[str]:
    """Why two entries may not be compared; empty where they may."""
    found = []
    if one["inputs"] != two["inputs"]:
        found.append(f"inputs: {one['inputs']} then, {two['inputs']} now")
    for fact in _DECIDING:
        then, now = one["machine"].get(fact), two["machine"].get(fact)
        if then != now:
            found.append(f"{fact}: {then} then, {now} now")
    return found


def last_comparable(history: Sequence[dict[str, Any]], now: Mapping[str, Any]) -> dict[str, Any]:
    """The newest entry that `now` may be held against.

    Raises:
        BaselineError: where there is none, with what differs from the newest.
    """
    if not history:
        raise BaselineError(f"'{now['target']}' has no baseline on {now['device']}: `fxopt baseline save` makes one")
    comparable: list[dict[str, Any]] = [one for one in history if not differences(one, now)]
    if comparable:
        return comparable[-1]
    why = "; ".join(differences(history[-1], now))
    raise BaselineError(
        f"none of {len(history)} baselines of '{now['target']}' may be compared with this run; the newest differs in "
        f"{why}: compare with a revision on this machine, by `fxopt ci`"
    )


def judge_stored(then: Mapping[str, Any], now: Mapping[str, Any], threshold: float) -> str:
    """A verdict without pairs: more than the threshold, with intervals that do not meet.

    The speed of a machine wanders between two runs, which no interval of either knows of: a regression found so is a
    reason to look, and `fxopt ci` is the way to.
    """
    ratio = now["median_ms"] / then["median_ms"]
    if ratio > 1 + threshold and now["low_ms"] > then["high_ms"]:
        return "REGRESSION"
    if 1 / ratio > 1 + threshold and now["high_ms"] < then["low_ms"]:
        return "FASTER"
    if now["high_ms"] / then["low_ms"] < 1 + threshold:
        return "OK"
    return "INCONCLUSIVE"


def noise_band(history: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Milliseconds between which entries of one machine lie, by their median and its absolute deviation (x3)."""
    if len(history) < 3:
        return None
    logs = [math.log(one["median_ms"]) for one in history]
    middle = statistics.median(logs)
    spread = 3 * 1.4826 * statistics.median(abs(one - middle) for one in logs)
    return math.exp(middle - spread), math.exp(middle + spread)
