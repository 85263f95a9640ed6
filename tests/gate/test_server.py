"""The process that forks for each worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxopt.gate import server


@pytest.mark.parametrize(
    ("said", "expected"),
    [({}, "3000 1 -"), ({"OMP_WAIT_POLICY": "active"}, "- - active"), ({"GOMP_SPINCOUNT": "7"}, "7 - -")],
)
def test_threads_spin_briefly_unless_the_user_says_how_they_wait(
    said: dict[str, str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho " + " ".join(f"${{{name}:--}}" for name in names) + "\n")
    python.chmod(0o700)
    found = server.started(str(python), tmp_path / "log")
    assert found.process is not None
    found.process.wait()
    found.end()
    assert (tmp_path / "log").read_text() == expected + "\n"
