"""Texts that only tell a person something, and on which nothing of a forward depends."""

from __future__ import annotations

import ast
import functools
import itertools
import linecache
import re
import sys

from fxopt.capture.frames import is_fxopts

_TELLS = re.compile(r"(^|_)(print|warn|warning|debug|info|error|exception|critical|log)$")
"""The names of what takes a message: `logger.info`, `print`."""
_CHECKS = re.compile(r"(^|_)(assert|check)$")
"""And of what takes one behind a condition: `torch._assert`."""
_TELLERS = ("logging", "warnings")
"""Modules that put messages together themselves."""
_MAKES_TEXT = ("str", "repr", "format", "join")

Span = tuple[tuple[int, int], tuple[int, int]]
"""Where it begins and ends, each by line and byte."""


def is_message() -> bool:
    """Whether the text that is being made goes into a message alone, as the source says at that place.

    Such texts stand in many forwards, `torch._assert(x.dim() == 3, f"got {x.shape}")`; a text may also be the key of a
    table, though, and is taken for one where the source does not show that it isn't.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and is_fxopts(frame.f_code.co_filename):
        frame = frame.f_back
    if str(frame.f_globals.get("__name__")).partition(".")[0] in _TELLERS:
        return True
    code = frame.f_code
    line, end_line, byte, end_byte = next(itertools.islice(code.co_positions(), frame.f_lasti // 2, None))
    if line is None or end_line is None or byte is None or end_byte is None:
        return False
    source = "".join(linecache.getlines(code.co_filename, frame.f_globals))
    at = (line, byte), (end_line, end_byte)
    texts, prints = _messages(source)
    return at in prints or any(first <= at[0] and at[1] <= last for first, last in texts)


@functools.lru_cache(maxsize=16)
def _messages(source: str) -> tuple[list[Span], set[Span]]:
    """Where messages stand, and the calls of `print`, which makes texts of what it is given by itself."""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a cell of a notebook, with commands of its own
        return [], set()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    told = itertools.chain.from_iterable(map(_told, calls))
    return [_span(node) for node in told if _is_text(node)], {_span(c) for c in calls if _name(c.func) == "print"}


def _told(call: ast.Call) -> list[ast.expr]:
    """The arguments by which something is told."""
    checks = _CHECKS.search(_name(call.func))
    if not checks and not _TELLS.search(_name(call.func)):
        return []
    return [*call.args[1 if checks else 0 :], *(keyword.value for keyword in call.keywords)]


def _span(node: ast.expr) -> Span:
    end = node.end_lineno or node.lineno, node.end_col_offset or node.col_offset
    return (node.lineno, node.col_offset), end


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, (ast.Add, ast.Mod)) and (_is_text(node.left) or _is_text(node.right))
    if isinstance(node, ast.Call):
        return _name(node.func) in _MAKES_TEXT
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
