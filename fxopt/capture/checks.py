"""Checks in a source: expressions of which one answer raises an error, and which instruction asks what of one.

assert a; if b or c: raise; torch._check(d)
"""

from __future__ import annotations

import ast
import dis
import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass

from fxopt.capture.source import Span, is_within, name_of, parsed, source_of, span_in, span_of

_TORCHS_CHECKS = {
    "_check": "RuntimeError",
    "_check_value": "ValueError",
    "_check_type": "TypeError",
    "_check_index": "IndexError",
    "_check_not_implemented": "NotImplementedError",
}
"""Functions of torch that raise what they are named for where their first argument does not hold."""
_ANSWERS = ("bool", "item", "equal", "allclose", "is_nonzero")
"""Calls that give what they read of a tensor as it is."""
_BRANCHES = ("POP_JUMP", "JUMP_IF", "UNARY_NOT", "TO_BOOL")
"""Instructions that ask whether what was just evaluated holds, by how they begin."""
_COMPARES = ("COMPARE_OP", "CONTAINS_OP")


@dataclass(frozen=True)
class Check:
    """An expression that has to hold, or must not, for a forward to go on; and what raises which error otherwise."""

    test: ast.expr
    holds: bool
    error: ast.expr
    raises: ast.stmt | ast.expr


@dataclass(frozen=True)
class Part:
    """A question in a check: `a > 1` in `if a > 1 and b.any(): raise`.

    Attributes:
        check: the check.
        index: which one it is of those that the check refuses by only together; 0 where it refuses by this one.
        asks_on: the answer after which the check asks the next one; None where this answer ends it.
        is_last: whether it asks no other one after this.
        is_whole: whether it is not one of several in a question of the check, as `b` in `a and (b or c)`.
    """

    check: Check
    index: int = 0
    asks_on: bool | None = None
    is_last: bool = True
    is_whole: bool = True


@functools.lru_cache(maxsize=4096)
def part_of(code: types.CodeType, at: int) -> Part | None:
    """What an instruction asks for a check."""
    instruction, span = _asked(code, at)
    if span is None:
        return None
    checks = [check for check in _checks(source_of(code)) if is_within(span, span_of(check.test))]
    if not checks:
        return None
    check = max(checks, key=lambda each: span_of(each.test)[0])
    test, holds = _without_nots(check.test, check.holds)
    if not isinstance(test, ast.BoolOp) or isinstance(test.op, ast.And) is holds:
        return Part(check) if _settles(test, holds, span, instruction) else None
    index, operand = next((i, each) for i, each in enumerate(test.values) if is_within(span, span_of(each)))
    is_last = index == len(test.values) - 1
    if not _settles(operand, holds, span, instruction):
        return None
    inner, refused = _without_nots(operand, not holds)
    if span_of(inner) == span:
        inverts = isinstance(inner, ast.Compare) and isinstance(inner.ops[0], ast.NotIn)
        return Part(check, index, refused is not inverts, is_last)
    return Part(check, index, is_whole=False) if is_last else None


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
def _checks(source: str) -> list[Check]:
    tree = parsed(source)
    return [] if tree is None else [check for node in ast.walk(tree) for check in _checks_of(node)]


def _checks_of(node: ast.AST) -> Iterator[Check]:
    if isinstance(node, ast.Assert):
        yield Check(node.test, True, ast.Name("AssertionError"), node)
    elif isinstance(node, ast.If):
        for branch, holds in ((node.body, False), (node.orelse, True)):
            raised = _raised(branch)
            if raised is not None and raised.exc is not None:
                yield Check(node.test, holds, raised.exc, raised)
    elif isinstance(node, ast.Call):
        name = name_of(node.func)
        if name in _TORCHS_CHECKS and node.args:
            yield Check(node.args[0], True, ast.Name(_TORCHS_CHECKS[name]), node)
        elif name == "_check_with" and len(node.args) > 1:
            yield Check(node.args[1], True, node.args[0], node)


def _raised(branch: list[ast.stmt]) -> ast.Raise | None:
    """The error with which a branch ends, whatever happens in it."""
    last = branch[-1] if branch else None
    leaves = any(isinstance(part, ast.Return | ast.Break | ast.Continue) for each in branch for part in ast.walk(each))
    return last if isinstance(last, ast.Raise) and not leaves else None


def caught_around(code: types.CodeType, at: Span) -> list[ast.expr | None]:
    """The classes of errors that are caught where `at` stands, and raised no further; None for any."""
    return [kind for body, kinds in _tries(source_of(code)) if is_within(at, body) for kind in kinds]


@functools.lru_cache(maxsize=64)
def _tries(source: str) -> list[tuple[Span, list[ast.expr | None]]]:
    """What is tried, and which errors do not get out of it."""
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
