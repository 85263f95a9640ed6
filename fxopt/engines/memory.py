"""Memory that is needed no more, freed and handed back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys

from torch import nn

LARGE_BYTES = 16 << 20
"""From here on what is free is worth the time of handing it back."""


def hand_back() -> None:
    """Let the C library return what is free inside its heap, where it can: glibc keeps it.

    oneDNN's reorder leaves a hole as large as the weight behind each weight that it packs, and no later one fits in.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def collect_beside(module: nn.Module) -> None:
    """Free modules that nobody holds any more, where one as large as `module` is worth the tenth of a second.

    A graph and its module hold each other, so that only the garbage collector frees them.
    """
    if sum(parameter.nbytes for parameter in module.parameters()) >= LARGE_BYTES:
        gc.collect()
