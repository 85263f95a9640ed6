"""Fixes as a diff, and written to the files."""

from __future__ import annotations

import difflib
import io
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
    taken = len(lines) + 1
    for fix in sorted(fixes, key=lambda each: (each.line, each.end_line), reverse=True):
        if fix.end_line >= taken:
            continue
        last = lines[fix.end_line - 1]
        ending = last[len(last.rstrip("\r\n")) :]
        lines[fix.line - 1 : fix.end_line] = [fix.text.replace("\n", ending or "\n") + ending]
        taken = fix.line
    return before, "".join(lines)


def _lines(text: str) -> list[str]:
    """As Python counts them: `splitlines` ends one at a form feed too, and at others."""
    return io.StringIO(text, newline="").readlines()
