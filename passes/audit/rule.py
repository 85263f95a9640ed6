"""What a rule is: a docstring for people, and a look at the evidence.

The docstring has a title, why it matters, and the sections `Bad:`, `Good:` and `Fix:`, in this order.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from fxopt.findings import Finding, Fix, Place, Precision, RuleCard, Severity
from passes.audit.evidence import Evidence, code

_SECTIONS = re.compile(r"^(.*?)\n\n(.*?)\n\nBad:\n(.*?)\n\nGood:\n(.*?)\n\nFix: (.*)$", re.DOTALL)


class Rule(ABC):
    """One kind of fault."""

    id: ClassVar[str]
    name: ClassVar[str]
    group: ClassVar[str]
    severity: ClassVar[Severity] = Severity.WARNING
    precision: ClassVar[Precision] = Precision.HIGH

    @abstractmethod
    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""

    def found(
        self,
        message: str,
        place: Place | None,
        module: str = "",
        related: tuple[Place, ...] = (),
        severity: Severity | None = None,
        fix: Fix | None = None,
        advice: str = "",
    ) -> Finding:
        """A finding of this rule; `advice` stands for that of its card."""
        card = card_of(type(self))
        severity = severity or self.severity
        if fix is not None and code.is_installed(fix.path):
            fix = None
        return Finding(self.id, severity, self.precision, message, place, module, related, advice or card.advice, fix)


@functools.cache
def card_of(rule: type[Rule]) -> RuleCard:
    """The card of a rule, read from its docstring."""
    match = _SECTIONS.match(inspect.cleandoc(rule.__doc__ or ""))
    if match is None:
        raise TypeError(f"the docstring of '{rule.__qualname__}' lacks a title, a reason, Bad:, Good: or Fix:")
    title, why, bad, good, advice = match.groups()
    bad, good = textwrap.dedent(bad), textwrap.dedent(good)
    why, advice = (" ".join(text.split()) for text in (why, advice))
    return RuleCard(
        rule.id, rule.name, rule.group, rule.severity, rule.precision, title.rstrip("."), why, bad, good, advice
    )
