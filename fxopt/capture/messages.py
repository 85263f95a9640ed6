"""Texts that only tell a person something, and on which nothing of a forward depends."""

from __future__ import annotations

import ast
import functools
import itertools
import re

from fxopt.capture.frames import asking
from fxopt.capture.source import Span, is_within, name_of, parsed, source_of, span_in, span_of

_TELLS = re.compile(r"(^|_)(print|warn|warning|debug|info|error|exception|critical|log)$")
"""The names of what takes a message: `logger.info`, `print`."""
_CHECKS = re.compile(r"(^|_)(assert|check)$")
"""And of what takes one behind a condition: `torch._assert`."""
_TELLERS = ("logging", "warnings")
"""Modules that put messages together themselves."""
_MAKES_TEXT = ("str", "repr", "format", "join")


def is_message() -> bool:
    """Whether the text that is being made goes into a message alone, as the source says at that place.

    Such texts stand in many forwards, `torch._assert(x.dim() == 3, f"got {x.shape}")`; a text may also be the key of a
    table, though, and is taken for one where the source does not show that it isn't.
    """
    frame = asking()
    if str(frame.f_globals.get("__name__")).partition(".")[0] in _TELLERS:
        return True
    at = span_in(frame.f_code, frame.f_lasti)
    if at is None:
        return False
    texts, prints = _messages(source_of(frame.f_code))
    return at in prints or any(is_within(at, text) for text in texts)


@functools.lru_cache(maxsize=16)
def _messages(source: str) -> tuple[list[Span], set[Span]]:
    """Where messages stand, and the calls of `print`, which makes texts of what it is given by itself."""
    tree = parsed(source)
    if tree is None:
        return [], set()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    told = itertools.chain.from_iterable(map(_told, calls))
    return [span_of(node) for node in told if _is_text(node)], {span_of(c) for c in calls if name_of(c.func) == "print"}


def _told(call: ast.Call) -> list[ast.expr]:
    """The arguments by which something is told."""
    checks = _CHECKS.search(name_of(call.func))
    if not checks and not _TELLS.search(name_of(call.func)):
        return []
    return [*call.args[1 if checks else 0 :], *(keyword.value for keyword in call.keywords)]


def _is_text(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, (ast.Add, ast.Mod)) and (_is_text(node.left) or _is_text(node.right))
    if isinstance(node, ast.Call):
        return name_of(node.func) in _MAKES_TEXT
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
