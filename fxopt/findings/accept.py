"""What is known and accepted: comments in the source, and a baseline file.

A comment on the line of a finding, or alone on the line above it, names the rule and gives a reason:

    self.scale = torch.ones(3)  # fxopt: ignore[FX101] moved by hand in `to_device`

A comment that names no rule, or gives no reason, accepts nothing, and says so.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import linecache
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from fxopt.errors import LoadError
from fxopt.findings.finding import Finding
from fxopt.findings.inspection import Inspection

_COMMENT = re.compile(r"#\s*fxopt:\s*ignore\b(?:\[([\w,\s]*)\])?\s*(.*)", re.IGNORECASE)


def suppress(found: Inspection) -> Inspection:
    """Take out what comments in the source accept."""
    kept, accepted, notes = [], list(found.suppressed), list(found.notes)
    for finding in found.findings:
        lacks = _lacks(finding)
        if lacks == "":
            accepted.append(finding)
            continue
        if lacks:
            notes.append(
                f"{finding.place}: the comment there has no effect, since it {lacks}: write "
                f"`# fxopt: ignore[{finding.rule}] the reason`"
            )
        kept.append(finding)
    return dataclasses.replace(
        found, findings=tuple(kept), suppressed=tuple(accepted), notes=tuple(dict.fromkeys(notes))
    )


def _lacks(finding: Finding) -> str | None:
    """What keeps a comment from accepting a finding, "" where nothing does; None where there is no comment on it."""
    if finding.place is None:
        return None
    own = linecache.getline(finding.place.path, finding.place.line)
    above = linecache.getline(finding.place.path, finding.place.line - 1) if finding.place.line > 1 else ""
    for line in (own, above if above.lstrip().startswith("#") else ""):
        match = _COMMENT.search(line)
        if match and not match[1]:
            return "names no rule"
        if match and finding.rule in re.split(r"[,\s]+", match[1].upper()):
            return "" if match[2].strip() else "gives no reason"
    return None


def fingerprints(findings: Iterable[Finding]) -> list[str]:
    """One for each, that stays when lines above it come and go: rule, file, text of the line, and a count."""
    seen: dict[str, int] = {}
    result = []
    for finding in findings:
        place = finding.place
        text = linecache.getline(place.path, place.line).strip() if place else finding.message
        key = "\0".join([finding.rule, place.shown() if place else "", text])
        seen[key] = seen.get(key, 0) + 1
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        result.append(f"{digest}:{seen[key]}")
    return result


@dataclass(frozen=True)
class Baseline:
    """The findings that were there already."""

    known: frozenset[str]

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """Read a file that `written` made.

        Raises:
            LoadError: where there is none, or it is something else.
        """
        try:
            return cls(frozenset(json.loads(path.read_text(encoding="utf-8"))["fingerprints"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is no list that `fxopt audit` wrote"
            raise LoadError(
                f"--baseline: cannot read '{path}': {why}; `fxopt audit TARGET --write-baseline {path}` writes one"
            ) from error

    def without_known(self, found: Inspection) -> Inspection:
        """Only what is new; the rest is known."""
        pairs = list(zip(found.findings, fingerprints(found.findings), strict=True))
        new, known = ([f for f, mark in pairs if (mark in self.known) is there] for there in (False, True))
        return dataclasses.replace(found, findings=tuple(new), known=(*found.known, *known))

    @staticmethod
    def written(found: Inspection) -> str:
        """The text of a file that accepts all of `found`, and what is known already."""
        everything = sorted((*found.findings, *found.known), key=lambda each: each.order)
        return json.dumps({"version": 1, "fingerprints": sorted(fingerprints(everything))}, indent=2) + "\n"
