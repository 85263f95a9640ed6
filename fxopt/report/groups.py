"""Changes and skips of a pass, put together where they say the same of different places."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fxopt.record.shape import PassRecord, SkipRecord

_QUOTED = re.compile(r"'[^']*'")


@dataclass(frozen=True)
class Group:
    """What was done, or not done and why, and where.

    Attributes:
        text: in the words of the pass; names in it are left out where they differ.
        places: `layer1.0.bn1 (model.py:41)`; "" for the model as a whole.
    """

    text: str
    places: tuple[str, ...]

    def shortened(self, most: int) -> str:
        """`20x folded into '...': bn1 (model.py:41), layer1.0.bn1 (model.py:57) and 18 more`."""
        times = f"{len(self.places)}x " if len(self.places) > 1 else ""
        if not any(self.places):
            return f"{times}{self.text}"
        shown = ", ".join(place or "the model" for place in self.places[:most])
        hidden = len(self.places) - most
        return f"{times}{self.text}: {shown}{f' and {hidden} more' if hidden > 0 else ''}"


def changes(entry: PassRecord) -> tuple[Group, ...]:
    """What a pass did, in the order of the first of each kind."""
    return _grouped([(change["what"], _place(change["where"], change["source"])) for change in entry["changes"]])


def skips(entry: PassRecord) -> tuple[Group, ...]:
    """What a pass left alone, by reason."""
    return reasons(entry["skips"])


def reasons(skips: Sequence[SkipRecord]) -> tuple[Group, ...]:
    """Places that were left alone, by reason."""
    return _grouped([(skip["reason"], _place(skip["where"], skip["source"])) for skip in skips])


def _grouped(found: Sequence[tuple[str, str]]) -> tuple[Group, ...]:
    kinds: dict[str, list[tuple[str, str]]] = {}
    for text, place in found:
        kinds.setdefault(_QUOTED.sub("'...'", text), []).append((text, place))
    return tuple(
        Group(kind if len({text for text, _ in members}) > 1 else members[0][0], tuple(place for _, place in members))
        for kind, members in kinds.items()
    )


def _place(where: str, source: str) -> str:
    return f"{where} ({source})".strip() if source else where
