"""Which line of the user's code is running."""

from __future__ import annotations

import functools
import linecache
import os
import re
import sys
import types
from pathlib import Path

import torch

from fxopt.capture.source import span_in
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


def asking() -> types.FrameType:
    """The frame whose code asks what fxopt answers, with nothing between but what torch passes a call through."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (is_fxopts(file := frame.f_code.co_filename) or file in _DISPATCHING):
        frame = frame.f_back
    return frame


def called() -> str:
    """The name of the function that is called where fxopt is asked; "" where it isn't called by one."""
    frame = asking()
    at = span_in(frame.f_code, frame.f_lasti)
    line = "" if at is None else linecache.getline(frame.f_code.co_filename, at[0][0])
    name = re.match(rb"\w+(?=\()", line.encode()[at[0][1] :]) if at is not None else None
    return name.group().decode() if name else ""


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
