"""Run a script in two processes, as `torchrun` does."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def torchrun(script: Path, *arguments: str) -> str:
    """Run `script` with `arguments` in two processes of one thread.

    Returns:
        What they printed.

    Raises:
        AssertionError: One of them failed; with what they wrote to stderr.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--module", "tests.torchrun", str(script), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_to_the_end(script: str) -> None:
    """Run `script` as `__main__` and leave without finalizing Python.

    A thread of gloo that still holds a tensor when the interpreter is taken down ends the process by SIGABRT, now and
    then (https://github.com/pytorch/pytorch/pull/179291).
    """
    runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    del sys.argv[0]
    run_to_the_end(sys.argv[0])
