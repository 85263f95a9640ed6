"""Everything around a measurement: held still while it runs, put back after it."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def quiet(device: torch.device, threads: int | None = None) -> Iterator[None]:
    """No gradients, no garbage collection, so many threads; afterwards all of it, and random states, as before.

    Args:
        device: whose random state is kept besides the CPU's.
        threads: that torch may run; None leaves them.
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
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        if threads is not None:
            torch.set_num_threads(had_threads)
        if collecting:
            gc.enable()
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def visible_operators() -> Iterator[None]:
    """Let torch.nn's attention and encoder layers run operator by operator, not as one that shows nothing."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
