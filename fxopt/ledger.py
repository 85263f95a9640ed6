"""What the passes of a run did, and what they left alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fxopt.bench.comparison import Comparison
from fxopt.contract import Change, Skip
from fxopt.sensitivity import Sensitivity


@dataclass(frozen=True)
class Proof:
    """What measuring said of a pass, or of what it did at one place.

    Attributes:
        where: qualified name of the place; empty for the whole pass.
        kept: whether it stays.
        reason: why it does not, or why it stays unmeasured; empty where it was measured to be faster.
        changes: that it is about.
        latency: of the module without them and with them; None where that was not measured.
    """

    where: str
    kept: bool
    reason: str
    changes: tuple[Change, ...]
    latency: Comparison | None = None


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
        proofs: of the pass, then of single places, where the user asked for them: what was kept, and what reverted.
        ranking: of the layers that it quantised, the costliest first, where the user asked for it.
        spared: qualified names of the places that the pass was told to leave alone, since changes there do not pay.
    """

    pass_name: str
    options: dict[str, Any]
    seconds: float
    changes: tuple[Change, ...]
    skips: tuple[Skip, ...]
    promise: str
    relative_error: float | None = None
    verify_seconds: float = 0.0
    proofs: tuple[Proof, ...] = ()
    ranking: tuple[Sensitivity, ...] = ()
    spared: frozenset[str] = frozenset()

    @property
    def modified(self) -> bool:
        """Whether the pass changed anything."""
        return bool(self.changes)

    @property
    def is_reverted(self) -> bool:
        """Whether the whole pass was taken back."""
        return bool(self.proofs) and not self.proofs[0].kept


@dataclass(frozen=True)
class Ledger:
    """All changes and skips of a run, pass by pass.

    Attributes:
        entries: of the passes, in order.
        uncompared: inputs on which nothing could be held to the original, and why.
    """

    entries: tuple[LedgerEntry, ...]
    uncompared: tuple[str, ...] = ()

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
