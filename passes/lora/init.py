"""What adapters start from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from passes.lora.adapter import LowRank
from passes.lora.forms import Experts, Form
from passes.lora.slices import mask_of, ranges

Init = Literal["default", "gaussian", "orthogonal", "pissa", "olora", "loftq"]
MOVES_WEIGHT = ("pissa", "olora", "loftq")
"""The inits that take a part out of the base weight: it is replaced by what is left."""


@dataclass(frozen=True)
class Recipe:
    """What a new adapter of one layer is made from; the fields are the options of the pass `lora`.

    Attributes:
        whole: add the update to the weight, and not beside the layer: what PEFT does with `target_parameters`.
    """

    rank: int
    alpha: float
    rslora: bool = False
    dora: bool = False
    dropout: float = 0.0
    init: Init = "default"
    bits: int = 4
    slices: tuple[str, ...] = ()
    whole: bool = False


@torch.no_grad()
def start(form: Form, weight: torch.Tensor, recipe: Recipe) -> tuple[LowRank, torch.Tensor | None]:
    """A new adapter, and what is left of the weight where the init took a part out of it.

    Adapters of a half-precision weight are float32: their steps would round away (Micikevicius et al. 2018).
    """
    dtype = torch.float32 if weight.dtype in (torch.float16, torch.bfloat16) else weight.dtype
    rank = recipe.rank * max(1, len(recipe.slices))
    a_shape, b_shape = form.shapes(rank)
    a = torch.empty(a_shape, dtype=dtype, device=weight.device)
    b = torch.zeros(b_shape, dtype=dtype, device=weight.device)
    inner = recipe.rank if len(recipe.slices) else b_shape[1]
    low = LowRank(a, b, rank=min(recipe.rank, inner), alpha=recipe.alpha, rslora=recipe.rslora, dropout=recipe.dropout)
    if recipe.slices:
        low.mask = mask_of((ranges(each, b_shape[0]) for each in recipe.slices for _ in range(recipe.rank)), b)
    left = None
    if recipe.init in MOVES_WEIGHT:
        left = _take_out(form, weight, low, recipe)
    else:
        _fill(form, low, recipe.init)
    if recipe.dora:
        update = low.scale * form.delta(low.A, low.left)
        base = weight if left is None else left
        length = form.norm(base.to(dtype) + update)
        low.magnitude = torch.nn.Parameter(length, requires_grad=False)
    return low, left


def _fill(form: Form, low: LowRank, init: str) -> None:
    if init == "orthogonal":
        # Orthonormal rows of A; B starts at zero, so that the outputs stay (Büyükakyüz 2024 compares the two).
        torch.nn.init.orthogonal_(low.A)
    elif init == "gaussian":
        low.A.normal_(std=1 / low.rank)
    elif form.starts_normal:
        low.A.normal_()
    else:
        # What nn.Linear and the convolutions start from: uniform within 1 / sqrt(fan in).
        bound = 1 / math.sqrt(low.A[0].numel())
        low.A.uniform_(-bound, bound)


def _take_out(form: Form, weight: torch.Tensor, low: LowRank, recipe: Recipe) -> torch.Tensor:
    """Fill A and B from the weight and give back what is left.

    pissa: `W = U S V`, `B = U_r sqrt(S_r / s)`, `A = sqrt(S_r / s) V_r`, left `W - s B A` (Meng et al. 2024).
    olora: `W = Q R`, `B = Q_r`, `A = R_r`, left `W - s B A` (Büyükakyüz 2024).
    loftq: left is `Q(W)`, in which each row has 2^bits levels, and `s B A` the best of rank r that was lost
    (Li et al. 2023, one step).
    """
    wide = weight.detach().double()
    matrix, rounded, rank = form.matrix(wide), None, low.A.shape[0]
    if recipe.init == "olora":
        q, r = torch.linalg.qr(matrix)
        left_factor, right_factor = q[:, :rank], r[:rank]
    else:
        if recipe.init == "loftq":
            rounded = _rounded(matrix, recipe.bits)
            matrix = matrix - rounded
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        root = (s[:rank] / low.scale).sqrt()
        left_factor, right_factor = u[:, :rank] * root, root[:, None] * v[:rank]
    low.A.copy_(padded(right_factor, 0, rank).reshape(low.A.shape))
    low.B.copy_(padded(left_factor, 1, rank).reshape(low.B.shape))
    if rounded is not None:
        rows = rounded.T if form.layout == "columns" else rounded
        return rows.reshape(weight.shape).to(weight.dtype)
    low.start_a, low.start_b = low.A.detach().clone(), low.B.detach().clone()
    left: torch.Tensor = wide - low.scale * form.delta(low.A.double(), low.B.double())
    return left.to(weight.dtype)


def padded(factor: torch.Tensor, dim: int, rank: int) -> torch.Tensor:
    """A factor of fewer rows or columns than the rank, filled up with zeros."""
    shape = list(factor.shape)
    shape[dim] = max(rank - shape[dim], 0)
    return torch.cat([factor, factor.new_zeros(shape)], dim)


def _rounded(matrix: torch.Tensor, bits: int) -> torch.Tensor:
    top = 2 ** (bits - 1) - 1
    scale = matrix.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / top
    rounded: torch.Tensor = (matrix / scale).round() * scale
    return rounded


def can_take_out(form: Form) -> bool:
    """Whether the inits that take a part out of the weight know this form: groups and experts have no one matrix."""
    return not isinstance(form, Experts) and form.groups == 1
