"""What capture learns on its way through a module tree."""

from __future__ import annotations

from dataclasses import dataclass, field

from fxopt.capture.captured import Constant, Guard, Opaque


@dataclass
class Found:
    """What is told of one module and all below it."""

    opaque: list[Opaque] = field(default_factory=list)
    guards: dict[Guard, None] = field(default_factory=dict)
    constants: list[Constant] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    calls: int = 0
    hidden_calls: int = 0
    forward_seconds: float = 0.0

    def add(self, other: Found) -> None:
        """Take up what was found below."""
        self.opaque += other.opaque
        self.guards |= other.guards
        self.constants += other.constants
        self.notes |= other.notes
        self.calls += other.calls
        self.hidden_calls += other.hidden_calls
        self.forward_seconds = self.forward_seconds or other.forward_seconds

    def note(self, *notes: str) -> None:
        """Keep notes, each once."""
        self.notes |= dict.fromkeys(notes)
