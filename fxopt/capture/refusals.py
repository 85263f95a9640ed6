"""Checks: decisions of which one answer refuses the input, by `assert`, an `if` that raises, or torch's own checks.

if labels.max() >= self.classes: raise ValueError("no such class")   =>   refuse([(max >= 10) is True], ...)

They may depend on values, and yet no other path is left out of the graph: there the module itself raises an error.
"""

from __future__ import annotations

import ast
import builtins
import dis
import functools
import re
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fxopt.capture.frames import asking, is_recording, is_users, user_source
from fxopt.capture.source import Span, is_within, name_of, parsed, source_of, span_in, span_of
from fxopt.graph import Source

_TORCHS_CHECKS = {
    "_check": "RuntimeError",
    "_check_value": "ValueError",
    "_check_type": "TypeError",
    "_check_index": "IndexError",
    "_check_not_implemented": "NotImplementedError",
}
"""Functions of torch that raise what they are named for where their first argument does not hold."""
_CHECKING = re.compile(r"(^|_)(assert|check)(_|$)")
"""Names of functions that check what their caller asks them to."""
_ANSWERS = ("bool", "item", "equal", "allclose", "is_nonzero")
"""Calls that give what they read of a tensor as it is."""
_BRANCHES = ("POP_JUMP", "JUMP_IF", "UNARY_NOT", "TO_BOOL")
"""Instructions that ask whether what was just evaluated holds, by how they begin."""
_COMPARES = ("COMPARE_OP", "CONTAINS_OP")
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
class _Check:
    """An expression that has to hold, or must not, for a forward to go on; and what raises which error otherwise."""

    test: ast.expr
    holds: bool
    error: ast.expr
    raises: ast.stmt | ast.expr


@dataclass(frozen=True)
class _Part:
    """A question in a check: `a > 1` in `if a > 1 and b.any(): raise`.

    Attributes:
        check: the check.
        index: which one it is of those that the check refuses by only together; 0 where it refuses by this one.
        asks_on: the answer after which the check asks the next one; None where this answer ends it.
        is_last: whether it asks no other one after this.
        is_whole: whether it is not one of several in a question of the check, as `b` in `a and (b or c)`.
    """

    check: _Check
    index: int = 0
    asks_on: bool | None = None
    is_last: bool = True
    is_whole: bool = True


@dataclass(frozen=True)
class Question:
    """A question that a check asks now.

    Attributes:
        key: of the check, in this call of its function.
        index: see `_Part`.
        is_open: whether the check goes on to ask more; then this answer refuses only together with others.
        is_last: whether there is nothing that it asks after another answer.
        is_whole: see `_Part`.
        refusal: what happens where the check does not hold.
    """

    key: tuple[int, Span]
    index: int
    is_open: bool
    is_last: bool
    is_whole: bool
    refusal: Refusal


def question(answer: bool) -> Question | None:
    """What asks the question that is answered now; None where the module may go on after another answer."""
    frame = asking()
    part = _part(frame.f_code, frame.f_lasti)
    error = None if part is None else _value(part.check.error, frame)
    if part is None or not (isinstance(error, type) and issubclass(error, Exception)) or _is_caught(error, frame):
        return None
    builtin = next(cls for cls in error.__mro__ if cls.__module__ == "builtins")
    text, location = _told(frame, part.check)
    refusal = Refusal(builtin.__name__, " ".join(text.split())[:_LONGEST], location)
    is_open = answer is part.asks_on
    return Question((id(frame), span_of(part.check.test)), part.index, is_open, part.is_last, part.is_whole, refusal)


@functools.lru_cache(maxsize=4096)
def _part(code: types.CodeType, at: int) -> _Part | None:
    """What an instruction asks for a check."""
    instruction, span = _asked(code, at)
    checks = (
        [] if span is None else [check for check in _checks(source_of(code)) if is_within(span, span_of(check.test))]
    )
    if span is None or not checks:
        return None
    check = max(checks, key=lambda each: span_of(each.test)[0])
    test, holds = _without_nots(check.test, check.holds)
    if not isinstance(test, ast.BoolOp) or isinstance(test.op, ast.And) is holds:
        return _Part(check) if _settles(test, holds, span, instruction) else None
    index, operand = next((i, each) for i, each in enumerate(test.values) if is_within(span, span_of(each)))
    is_last = index == len(test.values) - 1
    if not _settles(operand, holds, span, instruction):
        return None
    inner, refused = _without_nots(operand, not holds)
    if span_of(inner) == span:
        inverts = isinstance(inner, ast.Compare) and isinstance(inner.ops[0], ast.NotIn)
        return _Part(check, index, refused is not inverts, is_last)
    return _Part(check, index, is_whole=False) if is_last else None


def _asked(code: types.CodeType, at: int) -> tuple[str, Span | None]:
    """The name of the instruction at `at`, and the expression that it asks about."""
    instruction = dis.opname[code.co_code[at]]
    if instruction.startswith(_BRANCHES):  # a branch itself stands for the whole statement
        at -= 2
        while at > 0 and code.co_code[at] == dis.EXTENDED_ARG:
            at -= 2
    return instruction, span_in(code, at)


def _without_nots(test: ast.expr, holds: bool) -> tuple[ast.expr, bool]:
    while isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        test, holds = test.operand, not holds
    return test, holds


def _settles(test: ast.expr, holds: bool, at: Span, instruction: str) -> bool:
    """Whether `test` comes out as `holds` only where the part of it at `at` gives the answer that goes with that."""
    test, holds = _without_nots(test, holds)
    if span_of(test) == at:
        if isinstance(test, ast.Call) and instruction.startswith("CALL"):
            return name_of(test.func) in _ANSWERS
        is_chain = isinstance(test, ast.Compare) and len(test.ops) > 1
        return instruction.startswith(_BRANCHES + _COMPARES) and (holds or not is_chain)
    if not isinstance(test, ast.BoolOp) or isinstance(test.op, ast.And) is not holds:
        return False
    return any(_settles(part, holds, at, instruction) for part in test.values)


@functools.lru_cache(maxsize=64)
def _checks(source: str) -> list[_Check]:
    tree = parsed(source)
    return [] if tree is None else [check for node in ast.walk(tree) for check in _checks_of(node)]


def _checks_of(node: ast.AST) -> Iterator[_Check]:
    if isinstance(node, ast.Assert):
        yield _Check(node.test, True, ast.Name("AssertionError"), node)
    elif isinstance(node, ast.If):
        for branch, holds in ((node.body, False), (node.orelse, True)):
            raised = _raised(branch)
            if raised is not None and raised.exc is not None:
                yield _Check(node.test, holds, raised.exc, raised)
    elif isinstance(node, ast.Call):
        name = name_of(node.func)
        if name in _TORCHS_CHECKS and node.args:
            yield _Check(node.args[0], True, ast.Name(_TORCHS_CHECKS[name]), node)
        elif name == "_check_with" and len(node.args) > 1:
            yield _Check(node.args[1], True, node.args[0], node)


def _raised(branch: list[ast.stmt]) -> ast.Raise | None:
    """The error with which a branch ends, whatever happens in it."""
    last = branch[-1] if branch else None
    leaves = any(isinstance(part, ast.Return | ast.Break | ast.Continue) for each in branch for part in ast.walk(each))
    return last if isinstance(last, ast.Raise) and not leaves else None


def _told(frame: types.FrameType, check: _Check) -> tuple[str, str]:
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


def _text(check: _Check, source: str) -> str:
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
        tries = [] if at is None else [part for part in _tries(source_of(frame.f_code)) if is_within(at, part[0])]
        if any(_catches(kind, error, frame) for _, kinds in tries for kind in kinds):
            return True
        frame = frame.f_back
    return False


@functools.lru_cache(maxsize=64)
def _tries(source: str) -> list[tuple[Span, list[ast.expr | None]]]:
    """What is tried, and which errors do not get out of it; None for any."""
    tree = parsed(source) if "except" in source or "suppress" in source else None
    found: list[tuple[Span, list[ast.expr | None]]] = []
    for node in () if tree is None else ast.walk(tree):
        if isinstance(node, ast.Try):
            kinds = [each.type for each in node.handlers if not isinstance(each.body[-1], ast.Raise)]
        elif isinstance(node, ast.With):
            calls = [item.context_expr for item in node.items if isinstance(item.context_expr, ast.Call)]
            kinds = [kind for call in calls if name_of(call.func) == "suppress" for kind in call.args]
        else:
            continue
        found.append(((span_of(node.body[0])[0], span_of(node.body[-1])[1]), kinds))
    return found


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
