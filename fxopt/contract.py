"""What a pass is.

A pass is a frozen dataclass; its options are its fields. It walks one region of the captured program at a
time and says what it did and what it left alone: `Change` and `Skip`. Not its business: nothing at all.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

if TYPE_CHECKING:
    import torch.fx as fx

    from fxopt.graph import GraphModule, Region
    from fxopt.inputs import Inputs


class Promise(enum.Enum):
    """What a pass says of the outputs after it."""

    EXACT = "exact"
    """Equal to the bit."""
    CLOSE = "close"
    """Equal but for rounding; the tolerance goes by dtype."""
    CHANGES = "changes"
    """They change on purpose: the difference is reported, not judged."""


@dataclass(frozen=True)
class Change:
    """One rewrite that was made.

    Attributes:
        what: what was done, in a few words: `folded into 'conv1'`.
        where: qualified name of the module or node that it was done to.
        source: the user's line, `model.py:41`.
    """

    what: str
    where: str
    source: str = ""


@dataclass(frozen=True)
class Skip:
    """One place that a pass recognised and left alone, with the reason."""

    where: str
    reason: str
    source: str = ""


class Pass(ABC):
    """A rewrite of a captured program. Subclasses are frozen dataclasses; their fields are the options.

    A field says what it is for by `field(default=..., metadata={"help": "..."})`. Bad values are refused in
    `__post_init__` with a `SpecError`.
    """

    name: ClassVar[str]
    """What a spec calls the pass."""
    promise: ClassVar[Promise]
    after: ClassVar[tuple[str, ...]] = ()
    """Names of passes that must come earlier where both are asked for."""
    conflicts: ClassVar[tuple[str, ...]] = ()
    """Names of passes that can't be in the same pipeline."""
    for_speed: ClassVar[bool] = False
    """Whether it is there to make modules faster: under `--prove` it stays only if they are."""
    quantizes: ClassVar[bool] = False
    """Whether it puts quantisers in: `--sensitivity` and `--max-drop` are for these."""

    @property
    def bound(self) -> float | None:
        """The relative error of outputs that its options allow; None where the promise says all."""
        return None

    def aimed_at(self, engine: str) -> Pass:
        """The pass with what its options leave to the engine that will run the result; itself where that is nothing."""
        return self

    @abstractmethod
    def run(self, region: Region) -> Iterator[Change | Skip]:
        """Rewrite the graph of `region` in place and yield what was done and what was left alone.

        Never writes into a parameter or buffer: makes a new tensor or module and swaps it in.
        """

    def finish(self, module: GraphModule, calibration: Iterable[Inputs]) -> Iterator[Change | Skip]:
        """What is left to do once `run` has seen every region, and needs data or the whole module.

        Called once, with the module in working order and whatever calibration inputs the user gave (maybe
        none). It may set what the pass itself has added; it does not edit graphs. Nothing by default.
        """
        return iter(())


M = TypeVar("M")


class Rewrite(Pass, Generic[M]):
    """A pass that looks at each node by itself: `match` says whether, `rewrite` does it."""

    @abstractmethod
    def match(self, node: fx.Node, region: Region) -> M | Skip | None:
        """A match to rewrite, a `Skip` with the reason where it is unsafe, `None` where it is none of ours."""

    @abstractmethod
    def rewrite(self, match: M, region: Region) -> Change:
        """Make the change."""

    def run(self, region: Region) -> Iterator[Change | Skip]:
        """Offer each node, in order, to `match`."""
        for node in list(region.graph.nodes):
            if region.is_erased(node) or region.is_spared(node):
                continue
            found = self.match(node, region)
            if isinstance(found, Skip):
                yield found
            elif found is not None:
                yield self.rewrite(found, region)


def fixed_point(
    rewrite: Callable[[fx.Node, Region], Change | Skip | None], region: Region, *, backwards: bool = False
) -> Iterator[Change | Skip]:
    """Offer every node to `rewrite` until nothing changes any more: one fold brings the next up to a layer.

    Skips are those of the last round, when all that could change has changed.
    """
    changed, skips = True, list[Skip]()
    while changed:
        changed, skips = False, []
        for node in list(reversed(region.graph.nodes) if backwards else region.graph.nodes):
            outcome = None if region.is_erased(node) or region.is_spared(node) else rewrite(node, region)
            if isinstance(outcome, Skip):
                skips.append(outcome)
            elif outcome is not None:
                changed = True
                yield outcome
    yield from skips
