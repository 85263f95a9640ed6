"""What a layer was asked to become: how sparse, by which criterion, along which schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from passes.sparsify.pattern import Pattern

Criterion = Literal["magnitude", "random", "movement", "wanda", "taylor", "bn-scale"]
Schedule = Literal["one-shot", "cubic", "linear"]
Scope = Literal["layer", "global"]

TRAINED = ("movement", "taylor")
"""Criteria whose scores are sums of gradients."""


@dataclass(frozen=True)
class Plan:
    """The options of one run of the pass. Masks with equal plans belong together.

    Attributes:
        amount: share of the weights that are zero in the end.
        pattern: what is removed as one.
        scope: where units compete.
        criterion: what makes a unit worth keeping.
        schedule: how the amount grows.
        begin: optimizer steps before the first removal.
        steps: optimizer steps from there to the full amount.
        every: optimizer steps between two removals.
        seed: of the criterion random.
    """

    amount: float
    pattern: Pattern
    scope: Scope = "layer"
    criterion: Criterion = "magnitude"
    schedule: Schedule = "one-shot"
    begin: int = 0
    steps: int = 1000
    every: int = 10
    seed: int = 0

    def amount_at(self, step: int) -> float:
        """Share of zeros after `step` optimizer steps; each removal holds for `every` steps.

            cubic    a (1 - (1 - p)^3)        linear    a p        p = (step - begin) / steps, from 0 to 1

        Source: Zhu & Gupta 2017, equation 1, with an initial sparsity of 0.
        """
        if self.schedule == "one-shot":
            return self.amount
        done = min(max(step - self.begin, 0), self.steps)
        if done < self.steps:
            done -= done % self.every
        share = done / self.steps
        return self.amount * (share if self.schedule == "linear" else 1 - (1 - share) ** 3)

    def is_due(self, step: int) -> bool:
        """Whether the masks are chosen anew at this step."""
        if self.schedule == "one-shot":
            return False
        done = step - self.begin
        return done == self.steps or (0 <= done < self.steps and done % self.every == 0)
