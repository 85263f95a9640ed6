"""What a run is doing, on terminals of several kinds."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pty = pytest.importorskip("pty")  # Windows has none
CODE = """
import time
from fxopt.cli.progress import progress
with progress(False) as stage:
    stage("load [base]")
    time.sleep(1.3)
"""


@pytest.mark.parametrize(("term", "said"), [("xterm", "0:00:01"), ("dumb", " s  load [base]")])
def test_the_seconds_go_on_while_a_stage_does_and_a_dumb_terminal_has_a_line_a_stage(term: str, said: str) -> None:
    ours, terminal = pty.openpty()
    subprocess.run([sys.executable, "-c", CODE], stderr=terminal, env=os.environ | {"TERM": term}, check=True)
    os.close(terminal)
    with os.fdopen(ours, "rb", buffering=0) as shown:
        text = shown.read(4096).decode()
    assert said in text and "load [base]" in text
