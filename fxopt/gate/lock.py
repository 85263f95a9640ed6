"""`fxopt.lock`: how often each pass fired on each target, so that a fusion that stops firing is noticed."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fxopt.errors import GateError

FILE = "fxopt.lock"
Counts = dict[str, dict[str, int]]
"""By pass, then by what it did, names left out: `folded into '...'`."""

_VERSION = 1
_QUOTED = re.compile(r"'[^']*'")


def count(passes: Sequence[Mapping[str, Any]]) -> Counts:
    """The changes of a run, counted; those of a pass that runs more than once together."""
    counts: dict[str, Counter[str]] = {}
    for entry in passes:
        kinds = (_QUOTED.sub("'...'", change["what"]) for change in entry["changes"])
        counts.setdefault(entry["name"], Counter()).update(kinds)
    return {name: dict(sorted(found.items())) for name, found in counts.items()}


def read(path: Path) -> dict[str, Counts] | None:
    """The counts by target; None where there is no file.

    Raises:
        GateError: where the file is none of ours.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise GateError(f"cannot read '{path}': {error}; `fxopt ci --update-lock` writes it anew") from error
    targets = content.get("targets") if isinstance(content, dict) else None
    if not isinstance(targets, dict) or content.get("version") != _VERSION:
        raise GateError(f"'{path}' is no lock file of this fxopt; `fxopt ci --update-lock` writes it anew")
    return targets


def updated(path: Path, found: Mapping[str, Counts]) -> str:
    """The file with the counts of these targets; those of others stay, where it can be read."""
    kept: dict[str, Counts] = {}
    with contextlib.suppress(GateError):
        kept = read(path) or {}
    content = {"version": _VERSION, "targets": dict(sorted({**kept, **found}.items()))}
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def lost(locked: Counts, now: Counts) -> list[str]:
    """What fired more often when the lock was written, in words."""
    found = []
    for name, kinds in locked.items():
        for kind, before in kinds.items():
            after = now.get(name, {}).get(kind, 0)
            if after < before:
                found.append(f"{name}: {kind}: {after} instead of {before}")
    return found
