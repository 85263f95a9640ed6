"""Whether a line decides: an `if`, a `while`, a condition inside an expression, the bounds of a loop."""

from __future__ import annotations

import ast
import dataclasses
import functools

from fxopt.findings import Place
from passes.audit.evidence.code import column, end, start, syntax
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
        tests = [part for field, part in ast.iter_fields(node) if field in ("test", "iter")]
        for test in (*tests, *getattr(node, "ifs", ())):
            (first, left), (last, right) = start(test), end(test)
            found.append(((first, column(path, first, left)), (last, column(path, last, right) + 1)))
    return tuple(found)
