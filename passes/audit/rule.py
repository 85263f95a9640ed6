"""What a rule is: a docstring for people, and a look at the evidence.

The docstring has a title, why it matters, and the sections `Bad:`, `Good:` and `Fix:`, in this order.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fxopt.findings import Finding, Fix, Place, Precision, RuleCard, Severity
from passes.audit.evidence import Evidence, code

_SECTIONS = re.compile(r"^(.*?)\n\n(.*?)\n\nBad:\n(.*?)\n\nGood:\n(.*?)\n\nFix: (.*)$", re.DOTALL)
_GROUPS = ("registration", "device", "numerics", "training", "deployment", "speed")


@dataclass(frozen=True)
class Found:
    """What a rule says of one place: a finding, whose severity and advice are those of the rule where it has none."""

    message: str
    place: Place | None
    module: str = ""
    related: tuple[Place, ...] = ()
    severity: Severity | None = None
    fix: Fix | None = None
    advice: str = ""


Look = Callable[[Evidence], Iterator[Found]]


@dataclass(frozen=True)
class Rule:
    """One kind of fault.

    Attributes:
        id: its first digit tells the group.
        look: gives all places that have the fault.
        severity: of its findings, where they do not say otherwise.
        precision: of all of them.
        once_a_line: whether it says no more than one thing of a line.
    """

    id: str
    look: Look
    severity: Severity
    precision: Precision
    once_a_line: bool

    @functools.cached_property
    def card(self) -> RuleCard:
        """What it says of itself, read from the docstring."""
        name = self.look.__name__
        match = _SECTIONS.match(inspect.cleandoc(self.look.__doc__ or ""))
        if match is None:
            raise TypeError(f"the docstring of '{name}' lacks a title, a reason, Bad:, Good: or Fix:")
        title, why, bad, good, advice = match.groups()
        bad, good = textwrap.dedent(bad), textwrap.dedent(good)
        why, advice = (" ".join(text.split()) for text in (why, advice))
        kind = (name.replace("_", "-"), _GROUPS[int(self.id[2]) - 1], self.severity, self.precision)
        return RuleCard(self.id, *kind, title.rstrip("."), why, bad, good, advice)

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All that it finds."""
        lines = set()
        for found in self.look(evidence):
            line = found.place and (found.place.path, found.place.line)
            if self.once_a_line and line in lines:
                continue
            lines.add(line)
            severity, advice = found.severity or self.severity, found.advice or self.card.advice
            fix = None if found.fix is None or code.is_installed(found.fix.path) else found.fix
            where = (found.place, found.module, found.related)
            yield Finding(self.id, severity, self.precision, found.message, *where, advice, fix)


def rule(
    id: str,
    severity: Severity = Severity.WARNING,
    precision: Precision = Precision.HIGH,
    *,
    once_a_line: bool = False,
) -> Callable[[Look], Rule]:
    """Make a rule of a function: its name and its docstring are those of the rule."""
    return lambda look: Rule(id, look, severity, precision, once_a_line)
