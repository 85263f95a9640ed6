"""The fixture `fxopt_gate`, by pytest processes in a repository."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pytest_fxopt import FxoptGate
from tests.gate.conftest import MODEL, SLOWER, Repo

TEST = """
def test_latency(fxopt_gate):
    found = fxopt_gate({target!r}, fail_over="5%", budget=0.3, size=0.5)
    assert found["latency"]["pairs"] >= 6
"""


def run(repo: Repo, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rfs", *arguments]
    return subprocess.run(command, cwd=repo.path, env=repo.environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("head", "target", "outcome", "said"),
    [
        (SLOWER, "model.py", "1 failed", "FAILED test_model.py::test_latency - Failed: model.py: REGRESSION"),
        (MODEL, "model.py", "1 passed", ""),
        (MODEL, "new.py", "1 skipped", "there is no file 'new.py'"),
        (MODEL, "{repo}/model.py", "1 passed", ""),
        (MODEL, "broken.py", "1 failed", "broken then"),
    ],
)
def test_outcomes(repo: Repo, head, target, outcome, said):
    repo.commit(broken="raise ValueError('broken then')")
    test = TEST.format(target=target.format(repo=repo.path))
    repo.write(model=head, new=MODEL, broken=MODEL, test_model=test)
    done = run(repo, "--fxopt-base", "HEAD")
    assert outcome in done.stdout, done.stdout + done.stderr
    assert said in done.stdout
    assert repo.left_behind() == []


def test_what_is_no_limit_is_named():
    with pytest.raises(TypeError, match="takes no 'engine': the limits are memory, size"):
        FxoptGate("HEAD", strict=False, launcher=None)("model.py", engine="onednn")


def test_the_plugin_does_not_import_torch():
    code = "import sys, pytest_fxopt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
