"""Whether there is a GPU for the engines that need one, and what torch rounds to on it."""

from __future__ import annotations

import torch

TF32_TOLERANCE = 5e-3
"""Relative error of outputs whose products had their operands rounded to the 10 bits of TF32."""


def why_no_gpu() -> str | None:
    """Why nothing runs on CUDA here, and what would bring it; None where something does."""
    if torch.cuda.is_available():
        return None
    return "there is no CUDA device; on a machine with one, `pip install torch` brings a build for it"


def rounding_of_torch(device: torch.device) -> float:
    """The relative error of torch's own products of float32 on a device, beside what float32 itself loses.

    On a GPU torch rounds the operands of convolutions to TF32 unless it is told not to, so its outputs tell nothing
    finer about those of an engine that rounds less.
    """
    if device.type != "cuda":
        return 0.0
    rounds = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    return TF32_TOLERANCE if rounds else 0.0
