"""Keeps zeros at zero while an optimizer trains, and moves masks along their schedule."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fxopt.errors import PassError
from passes.sparsify.choose import choose
from passes.sparsify.mask import Masked, masked_weights
from passes.sparsify.plan import Plan


class SparsityScheduler:
    """Masks the weights after each step of an optimizer; `step` moves along the schedule.

        scheduler = SparsityScheduler(module, optimizer)
        ...
        loss.backward(); optimizer.step(); scheduler.step(); optimizer.zero_grad()

    Momentum and weight decay move a weight whose gradient is zero, so that masking gradients alone leaves no zeros;
    here they are zero again before anything reads them. Scores are not the optimizer's: their gradients are taken
    before it sees them, unscaled where a `GradScaler` scales. With several processes gradients are equal on all, and
    so are masks.

    Args:
        module: with masks of the pass `sparsify`, bare or wrapped (DistributedDataParallel, another module).
        optimizer: of its parameters.

    Raises:
        PassError: the module has no masks.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer):
        self._found = masked_weights(module)
        if not self._found:
            raise PassError("the module has no masks; put them on with the pass 'sparsify' first")
        self._plans: dict[Plan, list[Masked]] = defaultdict(list)
        for each in self._found:
            self._plans[each.mask.plan].append(each)
        self._step = 0
        optimizer.register_step_pre_hook(self._before_optimizer)
        optimizer.register_step_post_hook(lambda *_: self._apply())
        self._apply()

    def step(self) -> None:
        """One optimizer step is done: choose the masks anew where a schedule says so."""
        self._step += 1
        for plan, found in self._plans.items():
            if plan.is_due(self._step):
                choose(found, plan, plan.amount_at(self._step))
        self._apply()

    @property
    def amounts(self) -> tuple[float, ...]:
        """What share of the weights each plan wants at zero by now."""
        return tuple(plan.amount_at(self._step) for plan in self._plans)

    @property
    def sparsity(self) -> Mapping[str, float]:
        """Share of zeros in the mask of each layer."""
        return {each.name: each.mask.sparsity for each in self._found}

    def state_dict(self) -> dict[str, Any]:
        """What is to be saved beside the module, which has the masks themselves."""
        return {"step": self._step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        self._step = int(state["step"])

    def _before_optimizer(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take the gradients of scores, those too that a closure makes within the step."""
        self._take_gradients(optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # behind the optimizer itself
        if closure is None:
            return args, kwargs

        def taking() -> Any:
            loss = closure()
            self._take_gradients(optimizer)
            return loss

        return args[:1], {**kwargs, "closure": taking}

    @torch.no_grad()
    def _take_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        scale = getattr(optimizer, "grad_scale", None)  # of those that unscale within their own kernel
        for each in self._found:
            score = each.mask.score
            if score is None or score.grad is None:
                continue
            grad = score.grad if scale is None else score.grad / scale
            grad = torch.where(grad.isfinite(), grad, 0)
            # A weight that moves away from zero has W dL/dW < 0; Taylor's error of removing it is |W dL/dW|.
            score.add_(grad.abs() if each.mask.plan.criterion == "taylor" else -grad)
            score.grad = None

    def _apply(self) -> None:
        for each in self._found:
            each.apply()
