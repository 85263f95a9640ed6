"""A pass that looks and does not rewrite: what `fxopt audit` runs, by any package that offers one."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from fxopt.contract import Pass
from fxopt.findings.finding import Finding
from fxopt.findings.layer import Layer
from fxopt.findings.rule import RuleCard
from fxopt.inputs import Inputs


@dataclass(frozen=True)
class Subject:
    """What to look at.

    Attributes:
        name: what the command line calls it.
        module: the model; None where it cannot even be made, and only its source can be read.
        inputs: of one call; None where there are none.
        files: source files to read beside those of the module's classes.
    """

    name: str
    module: nn.Module | None
    inputs: Inputs | None
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """What was found, and what could not be looked at.

    Attributes:
        findings: in the order of their places.
        notes: what did not work, and why.
        suppressed: findings that a comment in the source accepts.
        layers: what was measured, layer by layer, in the order in which they ran.
        known: findings that a baseline accepts.
    """

    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    suppressed: tuple[Finding, ...] = ()
    layers: tuple[Layer, ...] = ()
    known: tuple[Finding, ...] = ()

    @classmethod
    def joined(cls, several: Iterable[Inspection]) -> Inspection:
        """One of many, with what they have in common only once."""
        parts = list(several)
        kinds = ([item for part in parts for item in getattr(part, kind.name)] for kind in dataclasses.fields(cls))
        findings, *others = (tuple(dict.fromkeys(items)) for items in kinds)
        return cls(tuple(sorted(findings, key=lambda each: each.order)), *others)


class Inspector(Pass):
    """A pass that finds faults in a module and leaves it, its inputs and the random state as they were."""

    @classmethod
    @abstractmethod
    def rules(cls) -> tuple[RuleCard, ...]:
        """All rules that it knows, in the order of their ids."""

    @abstractmethod
    def inspect(self, subject: Subject) -> Inspection:
        """Look at `subject`."""
