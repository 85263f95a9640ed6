"""Holds weights at zero where a mask says so, in the forward pass and for the gradient."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

SUFFIX = "_mask"
"""The mask of a parameter `weight` is the child `weight_mask` of the same module."""


class Mask(nn.Module):
    """W' = W where the mask is true, 0 elsewhere;  dL/dW = dL/dW' where it is true, 0 elsewhere

    With a score S of the same shape, `dL/dS = W dL/dW'`, everywhere: what movement and Taylor pruning add up.

    Args:
        weight: what is masked; the mask begins as true everywhere.

    Attributes:
        mask: a buffer of booleans in the shape of the weight.
        score: a parameter that only takes a gradient, or None.
    """

    stays_whole: ClassVar[bool] = True

    mask: torch.Tensor
    score: nn.Parameter | None

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.register_buffer("mask", torch.ones(weight.shape, dtype=torch.bool, device=weight.device))
        self.register_parameter("score", None)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The masked weight."""
        if not torch.is_grad_enabled():
            held = torch.where(self.mask, weight, 0)
            # Where no gradient is computed, too, torch takes other kernels for a weight that asks for one.
            return held.requires_grad_() if weight.requires_grad else held
        return _MaskedWeight.apply(weight, self.mask, self.score)  # type: ignore[no-any-return, no-untyped-call]

    @property
    def sparsity(self) -> float:
        """Share of zeros, from 0 to 1."""
        return 1 - int(self.mask.count_nonzero()) / max(self.mask.numel(), 1)

    def extra_repr(self) -> str:
        """Shape and share of zeros."""
        return f"{'x'.join(map(str, self.mask.shape))}, {self.sparsity:.1%} zeros"


def held_weight(module: nn.Module, leaf: str) -> torch.Tensor:
    """The parameter `leaf` of a module, with zeros where it has a mask that says so."""
    mask = module._modules.get(leaf + SUFFIX)
    weight: torch.Tensor = getattr(module, leaf)  # no parameter where a module around it has put another in its place
    return mask(weight) if isinstance(mask, Mask) else weight


class _MaskedWeight(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: torch.Tensor, mask: torch.Tensor, score: torch.Tensor | None) -> torch.Tensor:
        return torch.where(mask, weight, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        weight, mask, score = inputs
        ctx.save_for_backward(mask, *([weight] if score is not None else []))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        mask, *weight = ctx.saved_tensors
        of_weight = torch.where(mask, gradient, 0) if ctx.needs_input_grad[0] else None
        of_score = gradient * weight[0] if weight and ctx.needs_input_grad[2] else None
        return of_weight, None, of_score
