"""A git repository with a small model in it, and `fxopt ci` as a process there."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from fxopt.gate import Job, Limits, Plan, exit_code, run_gate
from fxopt.gate.processes import Launcher
from fxopt.record import schema

ROOT = Path(__file__).parents[2]

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 2)
    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))

torch.manual_seed(0)
model = Net()
example_inputs = torch.randn(4, 3, 16, 16)
"""
SLOWER = MODEL.replace(
    "return self.fc(", "x = x + 0 * sum(self.conv(x).mean() for _ in range(40))\n        return self.fc("
)
QUICK = ("--budget", "0.4", "--quiet")
LIMITS = {field.name for field in dataclasses.fields(Limits)}


class Repo:
    """A repository in a directory of its own."""

    def __init__(self, path: Path, launcher: Launcher, patch: pytest.MonkeyPatch) -> None:
        self.path, self.launcher, self.patch = path, launcher, patch
        path.mkdir(exist_ok=True)
        self.git("init", "--quiet", "--initial-branch", "main")

    def git(self, *arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        done = subprocess.run(["git", *identity, *arguments], cwd=self.path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    def write(self, **files: str) -> None:
        for name, text in files.items():
            (self.path / f"{name}.py").write_text(textwrap.dedent(text))

    def commit(self, **files: str) -> str:
        self.write(**files)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "a change")
        return self.git("rev-parse", "HEAD")

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("GITHUB_", "GIT_"))}
        return kept | {"PYTHONPATH": str(ROOT), "TMPDIR": str(self.path.parent)}

    def ci(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "fxopt", "ci", *arguments]
        return subprocess.run(
            command, cwd=self.path, env=self.environment | environment, capture_output=True, text=True, timeout=300
        )

    def gate(
        self, target: str | None = "model.py", *, base: str = "HEAD", below: str = ".", **settings: Any
    ) -> dict[str, Any]:
        """What the command does in a directory below, in this process and with processes that all tests share."""
        limits = Limits(**{key: settings.pop(key) for key in list(settings) if key in LIMITS})
        plan = {key: settings.pop(key) for key in list(settings) if key in ("find_causes", "python", "fresh")}
        jobs = (Job(str(target), str(target), budget=0.4, limits=limits, **settings),)
        self.patch.chdir(self.path / below)
        self.patch.setattr(tempfile, "tempdir", str(self.path.parent))
        record = run_gate(Plan(jobs, base, self.path, **plan), launcher=self.launcher)
        jsonschema.validate(record, schema("ci"), cls=jsonschema.Draft202012Validator)
        return record

    def only(self, *arguments: Any, code: int = 0, **settings: Any) -> dict[str, Any]:
        """The one target of a gate that ends so."""
        record = self.gate(*arguments, **settings)
        assert exit_code(record, strict=False) == code, record["targets"][0]
        found: dict[str, Any] = record["targets"][0]
        return found

    def left_behind(self) -> list[str]:
        """Worktrees and temporary directories that a gate did not take away."""
        trees = self.git("worktree", "list").splitlines()[1:]
        return trees + [entry.name for entry in self.path.parent.glob("fxopt-*")]


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    with Launcher() as made:
        yield made


@pytest.fixture
def make_repo(tmp_path: Path, launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Repo]:
    return lambda name: Repo(tmp_path / name, launcher, monkeypatch)


@pytest.fixture
def repo(make_repo: Callable[[str], Repo]) -> Repo:
    made = make_repo("repo")
    made.commit(model=MODEL)
    return made
