"""Everything around a measurement: held still while it runs, put back after it."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch

from fxopt.capture.state import with_versions
from fxopt.errors import EngineError


@contextmanager
def quiet(device: torch.device, threads: int | None = None, cores: Sequence[int] | None = None) -> Iterator[None]:
    """No gradients, no garbage collection, so many threads; afterwards all of it, and random states, as before.

    Args:
        device: whose random state is kept besides the CPU's.
        threads: that torch may run; None leaves them.
        cores: that all threads of the process are held to; None leaves them.

    Raises:
        EngineError: where the system has no such cores, or no way to hold threads to them.
    """
    collecting, had_threads = gc.isenabled(), torch.get_num_threads()
    python_state, numpy_state = random.getstate(), np.random.get_state()
    devices = [device] if device.type == "cuda" else []
    gc.collect()
    gc.disable()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        # Not inference_mode: its tensors would stay behind in modules that keep what they computed.
        with ExitStack() as held:
            if cores is not None:
                held.enter_context(pinned(cores))
            held.enter_context(torch.random.fork_rng(devices=devices))
            held.enter_context(with_versions())
            held.enter_context(torch.no_grad())
            yield
    finally:
        if threads is not None:
            torch.set_num_threads(had_threads)
        if collecting:
            gc.enable()
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """Hold every thread of this process to these cores; afterwards each is where it was.

    Raises:
        EngineError: where this process may not run on one of them, or the system can't do it.
    """
    if not hasattr(os, "sched_setaffinity"):
        raise EngineError("cannot hold threads to cores: this system has no call for that; leave `cores` out")
    allowed = os.sched_getaffinity(0)
    if not cores or not set(cores) <= allowed:
        raise EngineError(
            f"cannot hold threads to the cores {_listed(cores)}: this process may run on {_listed(sorted(allowed))}"
        )
    before = {thread: os.sched_getaffinity(thread) for thread in _threads()}
    try:
        for thread in before:
            _move(thread, cores)
        yield
    finally:
        # Threads that came meanwhile took the cores of the one that started them.
        for thread in _threads():
            _move(thread, before.get(thread, allowed))


@contextmanager
def visible_operators() -> Iterator[None]:
    """Let torch.nn's attention and encoder layers run operator by operator, not as one that shows nothing."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def set_interop_threads(threads: int) -> None:
    """Set how many operators torch may run at once. It can't be set back: torch takes it once a process.

    Raises:
        EngineError: where torch has set it already.
    """
    if torch.get_num_interop_threads() == threads:
        return
    try:
        torch.set_num_interop_threads(threads)
    except RuntimeError as error:
        raise EngineError(
            f"torch runs {torch.get_num_interop_threads()} operators at once and can't change that any more, since "
            f"some have run: set it first in a fresh process"
        ) from error


def _threads() -> list[int]:
    tasks = Path("/proc/self/task")
    return [int(task.name) for task in tasks.iterdir()] if tasks.is_dir() else [0]


def _move(thread: int, cores: Sequence[int] | set[int]) -> None:
    try:
        os.sched_setaffinity(thread, cores)
    except ProcessLookupError:  # it ended meanwhile
        return


def _listed(cores: Sequence[int]) -> str:
    return ", ".join(map(str, cores)) or "(none)"
