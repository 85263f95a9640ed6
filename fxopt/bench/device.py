"""Whether a device can be measured."""

from __future__ import annotations

import torch

from fxopt.errors import EngineError


def unavailable(device: torch.device | str) -> str | None:
    """Why nothing can be measured on a device, "no CUDA device" for one; None where it can."""
    try:
        wanted = torch.device(device)
    except RuntimeError:
        return f"{device!r} names no device"
    if wanted.type == "cpu":
        return None
    if wanted.type != "cuda":
        return f"fxopt measures on 'cpu' and 'cuda', not on {wanted.type!r}"
    if not torch.cuda.is_available():
        return "no CUDA device"
    if wanted.index is not None and wanted.index >= torch.cuda.device_count():
        return f"no CUDA device {wanted.index}, there are {torch.cuda.device_count()}"
    return None


def measurable(device: torch.device | str) -> torch.device:
    """The device, with its index where it is a GPU.

    Raises:
        EngineError: where nothing can be measured on it.
    """
    reason = unavailable(device)
    if reason is not None:
        raise EngineError(f"cannot measure on {str(device)!r}: {reason}; device='cpu' always works")
    wanted = torch.device(device)
    if wanted.type == "cuda" and wanted.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return wanted
