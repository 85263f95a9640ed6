"""Where in its source a function is."""

from __future__ import annotations

import ast
import functools
import itertools
import linecache
import types

Span = tuple[tuple[int, int], tuple[int, int]]
"""Where it begins and ends, each by line and byte."""


def span_in(code: types.CodeType, at: int) -> Span | None:
    """What an instruction evaluates, where the source is known."""
    line, end_line, byte, end_byte = next(itertools.islice(code.co_positions(), at // 2, None))
    if line is None or end_line is None or byte is None or end_byte is None:
        return None
    return (line, byte), (end_line, end_byte)


@functools.lru_cache(maxsize=1024)
def source_of(code: types.CodeType) -> str:
    """The file of a function; "" where there is none."""
    return "".join(linecache.getlines(code.co_filename))


@functools.lru_cache(maxsize=8)
def parsed(source: str) -> ast.Module | None:
    """A source as a tree; None for a cell of a notebook with commands of its own."""
    try:
        return ast.parse(source)
    except SyntaxError:
        return None


def span_of(node: ast.expr | ast.stmt) -> Span:
    """Where a part of a parsed source stands."""
    end = node.end_lineno or node.lineno, node.end_col_offset or node.col_offset
    return (node.lineno, node.col_offset), end


def is_within(inner: Span, outer: Span) -> bool:
    """Whether one stands in the other, or is it."""
    return outer[0] <= inner[0] and inner[1] <= outer[1]


def name_of(function: ast.expr) -> str:
    """The last part of the name by which something is called."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""
