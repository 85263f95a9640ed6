"""Which line of the user's is running, to the column where Python knows it."""

from __future__ import annotations

import itertools
import linecache
import sys
import traceback
from types import CodeType, FrameType

from fxopt.findings import Place
from passes.audit.evidence.code import column as characters
from passes.audit.evidence.code import is_users_file


def running(note: str = "") -> Place | None:
    """The innermost frame that is the user's; None where the forward consists of torch's own modules."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.endswith("evidence/driver.py"):
            return None
        if is_users_file(frame.f_code.co_filename):
            return _place(frame.f_code, frame.f_lasti, frame.f_lineno, note)
        frame = frame.f_back
    return None


def raised(error: BaseException) -> Place | None:
    """The innermost line of the user's that an error came through."""
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if is_users_file(frame.f_code.co_filename):
            found = line_of(frame.f_code.co_filename, line)
    return found


def line_of(path: str, line: int, note: str = "") -> Place:
    """The whole of a line."""
    text = linecache.getline(path, line).rstrip()
    indent = len(text) - len(text.lstrip())
    return Place(path, line, indent + 1, len(text) + 1 if text else 0, note)


def _place(code: CodeType, instruction: int, line: int, note: str) -> Place:
    positions = getattr(code, "co_positions", None)  # from Python 3.11 on
    if positions is not None:
        first, last, column, end = next(itertools.islice(positions(), instruction // 2, None), (None,) * 4)
        if first is not None and column is not None:
            # The line that runs, not the first of a statement over several.
            path = code.co_filename
            until = characters(path, first, end or 0) if first == last else 0
            return Place(path, first, characters(path, first, column), until, note)
    return line_of(code.co_filename, line, note)
