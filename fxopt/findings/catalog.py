"""The rules of all inspectors that are installed."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from fxopt import registry
from fxopt.errors import SpecError
from fxopt.findings.inspection import Inspector
from fxopt.findings.rule import RuleCard


def inspectors() -> list[type[Inspector]]:
    """All passes that inspect.

    Raises:
        SpecError: where none is installed.
    """
    found = [each for each in registry.available().values() if issubclass(each, Inspector)]
    if not found:
        raise SpecError("no installed pass inspects models; install fxopt again, or a package that offers one")
    return found


def cards() -> list[RuleCard]:
    """The rules of all of them, by id."""
    return sorted((card for each in inspectors() for card in each.rules()), key=lambda card: card.id)


def listed(rules: Sequence[RuleCard]) -> str:
    """One line a rule."""
    return "\n".join(f"{card.id}  {card.severity.value:<7}  {card.group:<12}  {card.title}" for card in rules)


def explained(rules: Sequence[RuleCard], wanted: str) -> str:
    """All that is known of one rule, by its id or its name.

    Raises:
        SpecError: where there is none; the message names one like it.
    """
    for card in rules:
        if wanted.lower() in (card.id.lower(), card.name):
            return card.text()
    close = difflib.get_close_matches(wanted.upper(), [card.id for card in rules], n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise SpecError(f"unknown rule '{wanted}'{hint or ';'} `fxopt audit --rules` lists them all")
