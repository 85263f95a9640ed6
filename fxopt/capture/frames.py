"""Which line of the user's code is running."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import torch

from fxopt.graph import Source

_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")


@functools.cache
def _is_users(file: str) -> bool:
    return not file.startswith(_OWN) and not file.endswith(("/contextlib.py", "/functools.py"))


def user_source() -> Source | None:
    """The innermost frame that belongs neither to torch nor to capture."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if _is_users(code.co_filename):
            return Source(code.co_filename, frame.f_lineno, getattr(code, "co_qualname", code.co_name))
        frame = frame.f_back  # type: ignore[assignment]
    return None
