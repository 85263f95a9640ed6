"""What a rule says of itself: the card that lists, help texts and SARIF are made from."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

from fxopt.findings.finding import Precision, Severity


@dataclass(frozen=True)
class RuleCard:
    """A rule, for people.

    Attributes:
        id: `FX101`.
        name: short, of words with hyphens.
        group: registration, device, numerics, training, deployment or speed.
        severity: of its findings, where they do not say otherwise.
        precision: likewise.
        title: one line.
        why: why it matters.
        bad: an example that has the fault.
        good: the same without it.
        advice: how to fix it.
    """

    id: str
    name: str
    group: str
    severity: Severity
    precision: Precision
    title: str
    why: str
    bad: str
    good: str
    advice: str

    def text(self) -> str:
        """All of it, to read on a terminal."""
        head = f"{self.id} {self.name} ({self.group}, {self.severity.value}, precision {self.precision.value})"
        return "\n\n".join(
            [head, self.title, self.why, f"Bad:\n{_code(self.bad)}", f"Good:\n{_code(self.good)}", self.advice]
        )

    def markdown(self) -> str:
        """All of it, as Markdown."""
        bad, good = (f"```python\n{textwrap.dedent(code).strip()}\n```" for code in (self.bad, self.good))
        return f"{self.why}\n\nBad:\n\n{bad}\n\nGood:\n\n{good}\n\n{self.advice}\n"


def _code(text: str) -> str:
    return textwrap.indent(textwrap.dedent(text).strip(), "    ")
