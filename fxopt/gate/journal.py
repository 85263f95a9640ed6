"""What a gate has found so far, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Journal:
    """JSON lines in a file, one a job.

    Args:
        path: the file; `remove` deletes it.
        key: what all lines must agree on: the same code, the same machine.
        fresh: start anew.
    """

    def __init__(self, path: Path, key: str, *, fresh: bool = False):
        self._path = path
        self._key = key
        self._found: dict[str, dict[str, Any]] = {}
        if fresh:
            self.remove()
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # cut off in the middle
                continue
            if entry["key"] == key:
                self._found[entry["job"]] = entry["found"]

    def get(self, job: Mapping[str, Any]) -> dict[str, Any] | None:
        """What was found for a job; None where it is still to do."""
        return self._found.get(_text(job))

    def add(self, job: Mapping[str, Any], found: Mapping[str, Any]) -> None:
        """Keep what was found for a job."""
        line = json.dumps({"key": self._key, "job": _text(job), "found": found})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def remove(self) -> None:
        """Forget everything."""
        self._path.unlink(missing_ok=True)


def _text(job: Mapping[str, Any]) -> str:
    return json.dumps(job, sort_keys=True)
