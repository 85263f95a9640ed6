"""Regions with or without gradients: a pair of calls in the graph; the second puts back what the first found."""

from __future__ import annotations

import torch
import torch.fx as fx


@fx.has_side_effect
def switch_gradients(enabled: bool) -> bool:
    """Let autograd record from now on, or not; returns whether it did so far."""
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(enabled)
    return before
