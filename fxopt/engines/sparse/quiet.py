"""Sparse tensors without torch's warnings that they are in beta, which are no news to the user of an engine."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch


def quiet(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `make` makes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta")
        warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")
        warnings.filterwarnings("ignore", message="The PyTorch API of SparseSemiStructuredTensor is in prototype")
        return make()
