"""Whether a line decides: an `if`, a `while`, a condition inside an expression, the bounds of a loop."""

from __future__ import annotations

import ast
import functools

from fxopt.findings import Place
from passes.audit.evidence.code import syntax


def in_decision(place: Place) -> bool:
    """Whether a place lies in the text that decides what runs next."""
    return any(
        first <= (place.line, place.column) < last or (place.line == first[0] and place.column <= first[1])
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
            start = (test.lineno, test.col_offset + 1)
            found.append((start, (test.end_lineno or test.lineno, (test.end_col_offset or 0) + 2)))
    return tuple(found)
