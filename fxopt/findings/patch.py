"""Fixes as a diff, and written to the files."""

from __future__ import annotations

import difflib
import io
import itertools
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from fxopt.findings.finding import Finding, Fix, relative


def patched(findings: Iterable[Finding]) -> dict[str, tuple[str, str]]:
    """The text of each file before and after all fixes. Of fixes that overlap, the first is taken."""
    by_file: dict[str, list[Fix]] = defaultdict(list)
    for fix in dict.fromkeys(finding.fix for finding in findings if finding.fix is not None):
        by_file[fix.path].append(fix)
    return {path: _applied(path, fixes) for path, fixes in sorted(by_file.items())}


def diff(texts: dict[str, tuple[str, str]]) -> str:
    """What `patched` would change, as a unified diff."""
    parts: list[str] = []
    for path, (before, after) in texts.items():
        name = relative(path)
        parts.extend(difflib.unified_diff(_lines(before), _lines(after), f"a/{name}", f"b/{name}"))
    return "".join(parts)


def write(texts: dict[str, tuple[str, str]]) -> None:
    """Write the files."""
    for path, (_, after) in texts.items():
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            file.write(after)


def _applied(path: str, fixes: list[Fix]) -> tuple[str, str]:
    with Path(path).open(encoding="utf-8", newline="") as file:
        before = file.read()
    lines = _lines(before)
    begins = [0, *itertools.accumulate(map(len, lines))]
    parts, done = list[str](), 0
    for fix in sorted(fixes, key=lambda each: (each.line, each.column)):
        start, end = begins[fix.line - 1] + fix.column - 1, begins[fix.end_line - 1] + fix.end_column - 1
        if start < done:
            continue
        line = lines[fix.line - 1]
        parts += [before[done:start], fix.text.replace("\n", line[len(line.rstrip("\r\n")) :] or "\n")]
        done = end
    return before, "".join(parts) + before[done:]


def _lines(text: str) -> list[str]:
    """As Python counts them: `splitlines` ends one at a form feed too, and at others."""
    return io.StringIO(text, newline="").readlines()
