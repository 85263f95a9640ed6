"""The workflow, the hook and the configuration of `examples/ci`, by running their steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fxopt.gate import read_jobs
from tests.gate.conftest import MODEL, ROOT, Repo

yaml = pytest.importorskip("yaml")
EXAMPLES = ROOT / "examples" / "ci"
CONFIG = '[[target]]\ntarget = "model.py"\nbudget = 0.4\nlimits = { size = "50%", latency = "900%" }\n'
NEW = CONFIG + '[[target]]\ntarget = "new.py"\ntimed = false\n'


@pytest.fixture
def shell(repo: Repo, tmp_path: Path):
    """Runs a command in the repository, with `fxopt` on the path and a `pip` that installs nothing."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "fxopt").write_text(f'#!/bin/sh\nexec {sys.executable} -m fxopt "$@"\n')
    (programs / "python").write_text('#!/bin/sh\necho "$@" >> installed\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    path = os.pathsep.join([str(programs), os.environ["PATH"]])

    def run(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = repo.environment | {"PATH": path} | environment
        return subprocess.run(["bash", "-e", "-c", command], cwd=repo.path, env=env, capture_output=True, text=True)

    return run


def test_the_workflow(repo: Repo, shell, make_repo, tmp_path):
    workflow = yaml.safe_load((EXAMPLES / "github-workflow.yml").read_text())
    steps = workflow["jobs"]["gate"]["steps"]
    assert next(step for step in steps if "checkout" in step.get("uses", ""))["with"]["fetch-depth"] == 0
    (repo.path / "fxopt.toml").write_text(CONFIG)
    (repo.path / ".gitignore").write_text("installed\nfxopt.json\nfxopt.xml\nfxopt.html\n__pycache__\n")
    repo.commit()
    repo.git("update-ref", "refs/remotes/origin/main", "HEAD")
    repo.commit(model=MODEL + "\nmodel.extra = nn.Linear(100, 100)\n")
    summary = tmp_path / "summary.md"
    actions = {"GITHUB_ACTIONS": "true", "GITHUB_BASE_REF": "main", "GITHUB_STEP_SUMMARY": str(summary)}
    install, gate = (shell(step["run"], **actions) for step in steps if "run" in step)
    assert install.returncode == 0 and "fxopt[html]" in (repo.path / "installed").read_text()
    assert gate.returncode == 3, gate.stdout + gate.stderr
    assert "::error file=model.py" in gate.stdout and "REGRESSION" in summary.read_text()
    assert json.loads((repo.path / "fxopt.json").read_text())["head"]["dirty"] is False
    assert "<h1" in (repo.path / "fxopt.html").read_text() and (repo.path / "fxopt.xml").exists()
    (repo.path / "fxopt.toml").write_text(NEW)
    repo.commit(model=MODEL, new=MODEL)
    assert shell(steps[-2]["run"], **actions).returncode == 0


@pytest.mark.parametrize(
    ("tail", "config", "code"),
    [
        ("\nname = 1\n", CONFIG, 0),
        ("\nmodel.extra = nn.Linear(100, 100)\n", CONFIG, 3),
        pytest.param("", NEW, 0, id="a target that the commit adds"),
    ],
)
def test_the_hook(repo: Repo, shell, tail, config, code):
    hooks = {
        hook["id"]: hook
        for hook in yaml.safe_load((EXAMPLES / "pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    }
    (repo.path / "fxopt.toml").write_text(CONFIG)
    repo.commit()
    (repo.path / "fxopt.toml").write_text(config)
    repo.write(model=MODEL + tail, new=MODEL)
    repo.git("add", "--all")
    hook = repo.path / ".git" / "hooks" / "pre-commit"
    hook.write_text(f"#!/bin/sh\n{hooks['fxopt']['entry']}\n")
    hook.chmod(0o755)
    done = shell("git -c user.name=a -c user.email=a@example.com commit -q -m next")
    assert (done.returncode != 0) == (code != 0), done.stdout + done.stderr
    assert "not measured" in done.stdout + done.stderr  # the latency, which the file asks for
    assert ("REGRESSION" in done.stdout + done.stderr) == (code != 0)
    assert hooks["fxopt-latency"]["stages"] == ["pre-push"]


def test_the_configuration_is_read():
    first, second = read_jobs(EXAMPLES / "fxopt.toml")
    assert (first.passes, first.limits.latency, second.limits.latency) == ("clean,fuse", 0.05, 0.08)
    assert second.inputs == ("64x1x8x8",) and second.limits.size == 0.1
