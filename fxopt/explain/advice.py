"""What a user can change so that an opaque part becomes a graph."""

from __future__ import annotations

_ADVICE = (
    (("makes a list", "reads the values", "decides on"), "compute it with tensors (torch.where, a mask, gather)"),
    (
        ("changes its attribute", "by its attribute", "second call"),
        "keep it in a buffer, and write it with copy_()",
    ),
    (("registers",), "make it in __init__, or run the module once before"),
    (("random numbers",), "draw with torch.rand() instead"),
    (("hook",), "remove the hook before capture, or put the change into forward()"),
    (("computed before or outside",), "pass the tensor in, register it, or use the plain operations instead"),
    (("buffer",), "keep its shape and dtype: write with copy_()"),
    (("fake tensors",), "capture with real weights and inputs"),
)


def advice(reason: str) -> str:
    """What to change, for the reason of an opaque part; "" where there is nothing known."""
    return next((text for words, text in _ADVICE if any(word in reason for word in words)), "")
