"""What the passes of a run did, and what they left alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fxopt.contract import Change, Skip


@dataclass(frozen=True)
class LedgerEntry:
    """What one pass did.

    Attributes:
        pass_name: its name.
        options: its options by name.
        seconds: wall time of the rewrite, without verification.
        changes: what it did.
        skips: what it recognised and left alone.
        promise: what it says of the outputs: "exact", "close" or "changes".
        relative_error: of the outputs against the original's, after this pass.
        verify_seconds: wall time of the verification.
    """

    pass_name: str
    options: dict[str, Any]
    seconds: float
    changes: tuple[Change, ...]
    skips: tuple[Skip, ...]
    promise: str
    relative_error: float | None = None
    verify_seconds: float = 0.0

    @property
    def modified(self) -> bool:
        """Whether the pass changed anything."""
        return bool(self.changes)


@dataclass(frozen=True)
class Ledger:
    """All changes and skips of a run, pass by pass."""

    entries: tuple[LedgerEntry, ...]

    def __iter__(self) -> Iterator[LedgerEntry]:
        return iter(self.entries)

    @property
    def changes(self) -> tuple[Change, ...]:
        """Of all passes, in order."""
        return tuple(change for entry in self.entries for change in entry.changes)

    @property
    def skips(self) -> tuple[Skip, ...]:
        """Of all passes, in order."""
        return tuple(skip for entry in self.entries for skip in entry.skips)
