"""Chooses which weights stay: scores by a criterion, and the best of them in a layer or in all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from passes.sparsify.mask import Masked
from passes.sparsify.pattern import Pattern, view
from passes.sparsify.plan import TRAINED, Plan

REGROWS = ("movement",)
"""Criteria by which a weight that was removed may come back."""


@torch.no_grad()
def choose(found: Sequence[Masked], plan: Plan, amount: float) -> None:
    """Set the masks of all that share a plan so that `amount` of their weights is zero.

    Where units can't be split the amount is the nearest one below; each layer keeps at least one unit.
    """
    pattern = plan.pattern
    if pattern.kind == "n:m":
        for each in found:
            scores = _scores(each, plan)
            kept = _best(pattern.unit_scores(scores), pattern.kept_of_each(amount))
            each.mask.keep(pattern.expand(kept, scores.shape))
    elif plan.scope == "global":
        _choose_among_all(found, plan, amount)
    else:
        for each in found:
            scores = _scores(each, plan)
            by_output = plan.criterion == "wanda" and pattern.kind == "element"
            units = scores.flatten(1) if by_output else pattern.unit_scores(scores).unsqueeze(0)
            count = units.shape[1]
            kept = _best(units, max(count - int(amount * count + 0.5), 1))
            each.mask.keep(pattern.expand(kept, scores.shape))


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """True at the `count` largest of each row; ties are broken by position, so that the count is exact."""
    kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
    best = scores.topk(count, dim=1).indices
    return kept.scatter_(1, best, True)


def _choose_among_all(found: Sequence[Masked], plan: Plan, amount: float) -> None:
    pattern = plan.pattern
    shapes = [view(each.mask.mask, each.mask.outputs).shape for each in found]
    units = [pattern.unit_scores(_scores(each, plan)) for each in found]
    counts = [len(one) for one in units]
    scores = torch.cat(units)  # a copy: single weights are units whose scores are those that training adds to
    for one in scores.split(counts):
        one[one.argmax()] = torch.inf
    sizes = [
        torch.full_like(one, pattern.weights_per_unit(shape), dtype=torch.int64)
        for one, shape in zip(units, shapes, strict=True)
    ]
    order = scores.argsort(stable=True)
    removed = torch.cat(sizes)[order].cumsum(0)
    kept = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    drop = order[removed <= int(amount * int(removed[-1]) + 0.5)]
    kept[drop[scores[drop] < torch.inf]] = False
    for each, part, shape in zip(found, kept.split(counts), shapes, strict=True):
        each.mask.keep(pattern.expand(part, shape))


def _scores(each: Masked, plan: Plan) -> torch.Tensor:
    """A score for each weight, as (outputs, taps, inputs)."""
    mask, weight = each.mask, each.weight.detach()
    scores = view(weight.abs().float(), mask.outputs)
    if plan.criterion in TRAINED:
        assert mask.score is not None
        scores = view(mask.score.detach().float(), mask.outputs)
    elif plan.criterion == "random":
        scores = _random(scores.shape, plan, each.name).to(weight.device)
    elif plan.criterion == "wanda":
        assert mask.input_norm is not None
        scores = scores * mask.input_norm
    elif plan.criterion == "bn-scale":
        gamma = cast("torch.Tensor", mask.norm[0].weight).detach().abs().float()
        scores = gamma.reshape(-1, 1, 1).expand(scores.shape)
    if plan.criterion in REGROWS:
        return scores
    return scores.masked_fill(~view(mask.mask, mask.outputs), -torch.inf)


def _random(shape: torch.Size, plan: Plan, name: str) -> torch.Tensor:
    """The same for the same seed and layer: on each process, and when the run is replayed."""
    seed = plan.seed
    for letter in name:
        seed = (seed * 131 + ord(letter)) % 2**31
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def words(pattern: Pattern, plan: Plan) -> str:
    """What a report says of a plan."""
    along = "" if plan.schedule == "one-shot" else f", {plan.schedule} over {plan.steps} steps"
    return f"{pattern} mask by {plan.criterion}{along}"
