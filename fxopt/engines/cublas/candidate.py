"""A layer that could run in eight bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fxopt.contract import Skip

Kernel = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Candidate:
    """One place of a graph, and what would compute it there.

    Attributes:
        key: what a choice calls it.
        skip: gives the reason for leaving it as it is.
        kernel: takes the input, and what is added to the product.
        plain: what computes the same now.
        given: what both take, of the example's shapes.
        put: calls the kernel there from now on.
    """

    key: str
    skip: Callable[[str], Skip]
    kernel: Kernel
    plain: Kernel
    given: tuple[torch.Tensor, ...]
    put: Callable[[], None]
