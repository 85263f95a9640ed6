"""Copies of tensors that take no memory until one of the two is written, and how often one was."""

from __future__ import annotations

import torch


def lazy_copy(tensor: torch.Tensor) -> torch.Tensor | None:
    """A copy of `tensor` without its history, made on write where torch can do that; None where it can't be copied."""
    value = tensor.detach()
    try:
        # Memory that came without an allocator (from a file, from numpy) can't be moved: to write into a
        # lazy copy of it, or into itself afterwards, crashes the process.
        if value.untyped_storage().resizable():
            return torch._lazy_clone(value)
    except (RuntimeError, NotImplementedError):
        pass
    try:
        return value.clone()
    except (RuntimeError, NotImplementedError):
        return None


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written; 0 for one that was made in inference mode, where torch does not count that."""
    return 0 if tensor.is_inference() else tensor._version
