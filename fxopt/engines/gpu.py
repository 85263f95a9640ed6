"""Whether there is a GPU for the engines that need one."""

from __future__ import annotations

import torch


def why_no_gpu() -> str | None:
    """Why nothing runs on CUDA here, and what would bring it; None where something does."""
    if torch.cuda.is_available():
        return None
    return "there is no CUDA device; on a machine with one, `pip install torch` brings a build for it"
