"""Whether a line decides: an `if`, a `while`, a condition inside an expression, the bounds of a loop."""

from __future__ import annotations

import ast
import dataclasses
import functools

from fxopt.findings import Place
from passes.audit.evidence.code import column, syntax
from passes.audit.evidence.places import line_of


def in_decision(place: Place) -> bool:
    """Whether a place lies in the text that decides what runs next; a whole line does where it has such text."""
    whole = dataclasses.replace(place, note="") == line_of(place.path, place.line)
    return any(
        first <= (place.line, place.column) < last or (whole and place.line == first[0])
        for first, last in _decisions(place.path)
        if first[0] <= place.line <= last[0]
    )


@functools.cache
def _decisions(path: str) -> tuple[tuple[tuple[int, int], tuple[int, int]], ...]:
    tree = syntax(path)
    found = []
    for node in ast.walk(tree) if tree else ():
        tests: list[ast.expr] = []
        if isinstance(node, (ast.If, ast.While, ast.IfExp, ast.Assert)):
            tests = [node.test]
        elif isinstance(node, ast.For):
            tests = [node.iter]
        elif isinstance(node, ast.comprehension):
            tests = [node.iter, *node.ifs]
        for test in tests:
            last = test.end_lineno or test.lineno
            start = (test.lineno, column(path, test.lineno, test.col_offset))
            found.append((start, (last, column(path, last, test.end_col_offset or 0) + 1)))
    return tuple(found)
