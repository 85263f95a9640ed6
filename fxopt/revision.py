"""What is left of a pass, and what takes some of it back: a measurement that shows no gain, an accuracy to be held."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import cast

from fxopt.capture.independent import independent_copy
from fxopt.contract import Change, Pass, Skip
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.ledger import Proof
from fxopt.rewriting import run_pass
from fxopt.sensitivity import Sensitivity


@dataclass(frozen=True)
class Kept:
    """What is left of a pass.

    Attributes:
        module: with what was kept.
        changes, skips: of the pass, as far as they were kept.
        spared: the places that it left alone for that.
        proofs: of the pass, and of single places, where it was measured.
        ranking: of the layers that it quantised, where that was asked for.
    """

    module: GraphModule
    changes: tuple[Change, ...]
    skips: tuple[Skip, ...]
    spared: frozenset[str] = frozenset()
    proofs: tuple[Proof, ...] = ()
    ranking: tuple[Sensitivity, ...] = ()


class Revision(ABC):
    """Judges what a pass did, once that is verified, and takes back what should not stay."""

    @abstractmethod
    def concerns(self, each: Pass) -> bool:
        """Whether a pass is its business."""

    @abstractmethod
    def revise(self, each: Pass, before: GraphModule, after: Kept, calibration: Sequence[Inputs]) -> Kept:
        """What is left of a pass.

        Args:
            each: the pass.
            before: the module before it; it is not changed.
            after: the module after it, with its changes.
            calibration: inputs for passes that need data.
        """


def rerun(each: Pass, before: GraphModule, calibration: Sequence[Inputs], spared: Set[str]) -> Kept:
    """The pass once more, on a copy of the module before it, without what it does at the places `spared`."""
    module = cast(GraphModule, independent_copy(before))
    changes, skips = run_pass(each, module, calibration, spared=spared)
    return Kept(module, changes, skips, frozenset(spared))
