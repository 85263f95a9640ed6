"""The peak of a process's resident memory during a call, in Linux's words: VmHWM."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def begin_peak() -> None:
    """From here on, the peak is that of what comes: not of what the process once held."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> int:
    """The most bytes that were resident since `begin_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def peak_of(call: Callable[[], Any]) -> int:
    """The peak during a call, made in a fork of this process, which it leaves as it is; 0 where the call fails."""
    ours, theirs = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            begin_peak()
            call()
            os.write(theirs, str(peak()).encode())
        finally:
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return int(told or 0)
