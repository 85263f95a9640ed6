"""Memory that was freed, handed back to the system."""

from __future__ import annotations

import ctypes
import sys


def hand_back() -> None:
    """Let the C library return what is free inside its heap, where it can: glibc keeps it.

    oneDNN's reorder leaves a hole as large as the weight behind each weight that it packs, and no later one fits in.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
