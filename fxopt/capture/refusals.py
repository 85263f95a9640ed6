"""Checks: decisions of which one answer refuses the input, by `assert`, an `if` that raises, or torch's own checks.

if labels.max() >= self.classes: raise ValueError("no such class")   =>   refuse([(max >= 10) is True], ...)

They may depend on values, and yet no other path is left out of the graph: there the module itself raises an error.
"""

from __future__ import annotations

import ast
import builtins
import re
import types
from dataclasses import dataclass
from typing import Any

from fxopt.capture.checks import Check, Part, caught_around, part_of
from fxopt.capture.frames import asking, is_recording, is_users, user_source
from fxopt.capture.source import Span, source_of, span_in, span_of
from fxopt.graph import Source

_CHECKING = re.compile(r"(^|_)(assert|check)(_|$)")
"""Names of functions that check what their caller asks them to."""
_CAUGHT_BY_PYTHON = ("__next__", "__getitem__", "__getattr__", "__missing__")
"""Methods whose errors Python itself takes for the end of a loop, or for something that is not there."""
_LONGEST = 160


@dataclass(frozen=True)
class Refusal:
    """What a module does where a decision is another.

    Attributes:
        error: the name of the class of its error, or of the builtin one that this is derived of.
        text: the statement that raises it, in the user's words.
        location: where that stands, `model.py:88`.
    """

    error: str
    text: str
    location: str


@dataclass(frozen=True)
class Question:
    """A question that a check asks now.

    Attributes:
        key: of the check, in this call of its function.
        part: of the check.
        is_open: whether the check goes on to ask more; then this answer refuses only together with others.
        refusal: what happens where the check does not hold.
    """

    key: tuple[int, Span]
    part: Part
    is_open: bool
    refusal: Refusal


def question(answer: bool) -> Question | None:
    """What asks the question that is answered now; None where the module may go on after another answer."""
    frame = asking()
    part = part_of(frame.f_code, frame.f_lasti)
    error = None if part is None else _value(part.check.error, frame)
    if part is None or not (isinstance(error, type) and issubclass(error, Exception)) or _is_caught(error, frame):
        return None
    builtin = next(cls for cls in error.__mro__ if cls.__module__ == "builtins")
    text, location = _told(frame, part.check)
    refusal = Refusal(builtin.__name__, " ".join(text.split())[:_LONGEST], location)
    return Question((id(frame), span_of(part.check.test)), part, answer is part.asks_on, refusal)


def _told(frame: types.FrameType, check: Check) -> tuple[str, str]:
    """The text of a check and its place; of one that is an argument of a function that checks, those of its call."""
    caller, compares = frame, any(isinstance(part, ast.Compare) for part in ast.walk(check.test))
    while not compares and _CHECKING.search(caller.f_code.co_name) and caller.f_back is not None:
        caller = caller.f_back
    at = span_in(caller.f_code, caller.f_lasti)
    if caller is frame or at is None or not is_users(caller.f_code.co_filename):
        return _text(check, source_of(frame.f_code)), str(user_source() or "")
    lines = source_of(caller.f_code).splitlines()[at[0][0] - 1 : at[1][0]]
    location = Source(caller.f_code.co_filename, caller.f_lineno, caller.f_code.co_qualname)
    return "\n".join(lines), str(location)


def _text(check: Check, source: str) -> str:
    raises = ast.get_source_segment(source, check.raises) or ""
    if not isinstance(check.raises, ast.Raise):
        return raises
    return f"if {ast.get_source_segment(source, check.test)}: {'... else: ' if check.holds else ''}{raises}"


def _is_caught(error: type[Exception], frame: types.FrameType | None) -> bool:
    """Whether the forward that is recorded goes on after an error that is raised in a frame."""
    while frame is not None and not is_recording(frame):
        if frame.f_code.co_name in _CAUGHT_BY_PYTHON:
            return True
        at = span_in(frame.f_code, frame.f_lasti)
        if at is not None and any(_catches(kind, error, frame) for kind in caught_around(frame.f_code, at)):
            return True
        frame = frame.f_back
    return False


def _catches(kind: ast.expr | None, error: type[Exception], frame: types.FrameType) -> bool:
    kinds = None if kind is None else _value(kind, frame)
    given = kinds if isinstance(kinds, tuple) else (kinds,)
    return not all(isinstance(each, type) for each in given) or issubclass(error, given)


def _value(expression: ast.expr, frame: types.FrameType) -> Any:
    """The class of an error, or classes, that an expression names or makes one of; None where it is not clear."""
    if isinstance(expression, ast.Tuple):
        return tuple(_value(each, frame) for each in expression.elts)
    if isinstance(expression, ast.Call):
        return _value(expression.func, frame)
    if isinstance(expression, ast.Attribute):
        return getattr(_value(expression.value, frame), expression.attr, None)
    if not isinstance(expression, ast.Name):
        return None
    names = (frame.f_locals, frame.f_globals, vars(builtins))
    return next((scope[expression.id] for scope in names if expression.id in scope), None)
