"""Waiting until threads that have nothing to do are asleep."""

from __future__ import annotations

import threading
import time
from pathlib import Path

_TASKS = Path("/proc/self/task")
_LOOK = 2e-4
"""Seconds between two looks."""


def wait_until_idle(longest: float = 0.25) -> bool:
    """Wait until no other thread of this process runs.

    Pools of threads wait for more work by spinning, those of torch's OpenMP for about 9 ms after a call, and what is
    timed meanwhile, on another engine's threads or in another process, has to share the cores with them.

    Args:
        longest: seconds after which to give up. Intel's OpenMP spins for 0.2 s.

    Returns:
        False where a thread goes on; True where all sleep, and where the system does not say.
    """
    until, own = time.perf_counter() + longest, str(threading.get_native_id())
    while _TASKS.is_dir() and any(_runs(task) for task in _TASKS.iterdir() if task.name != own):
        if time.perf_counter() > until:
            return False
        time.sleep(_LOOK)
    return True


def _runs(task: Path) -> bool:
    try:
        text = (task / "stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return False
    # The name before the state may hold spaces and brackets itself, and is cut off within a letter where it is long.
    return text.rpartition(") ")[2].startswith("R")
