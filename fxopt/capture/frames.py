"""Which line of the user's code is running."""

from __future__ import annotations

import functools
import os
import sys
import types
from pathlib import Path

import torch

from fxopt.graph import Source

_TORCH = str(Path(torch.__file__).parent) + os.sep
_FXOPT = str(Path(__file__).parents[1]) + os.sep
_DISPATCHING = (_TORCH + "overrides.py", _TORCH + "_tensor.py")
_RECORDING = str(Path(__file__).with_name("record.py"))


_TYPED = ("<stdin>", "<python-input-", "<ipython-input-")
"""What Python and IPython call the files of what is typed in."""


@functools.cache
def is_users(file: str) -> bool:
    """Whether a source file belongs neither to torch nor to fxopt, nor is generated."""
    if file.startswith("<"):
        return file.startswith(_TYPED)
    return not (file.startswith(_TORCH) or is_fxopts(file)) and not file.endswith(("/contextlib.py", "/functools.py"))


def is_fxopts(file: str) -> bool:
    """Whether a source file is one of fxopt's."""
    return file.startswith(_FXOPT)


def is_dispatching(file: str) -> bool:
    """Whether its code stands between a call that is written anywhere and what torch does for it."""
    return is_fxopts(file) or file in _DISPATCHING


def is_recording(frame: types.FrameType) -> bool:
    """Whether a frame is the recording itself: what stands below is not the forward."""
    return frame.f_code.co_filename == _RECORDING and frame.f_code.co_name == "record"


def user_source() -> Source | None:
    """The innermost frame of the recorded forward that belongs neither to torch nor to fxopt.

    None where there is none, as in a model that consists of torch's own modules.
    """
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if is_users(code.co_filename):
            return Source(code.co_filename, frame.f_lineno, getattr(code, "co_qualname", code.co_name))
        if is_recording(frame):  # module calls pass through other code of its file
            return None
        frame = frame.f_back  # type: ignore[assignment]
    return None
