"""Whether there is a GPU for the engines that need one, and what torch rounds to on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

TF32_TOLERANCE = 5e-3
"""Relative error of outputs whose products had their operands rounded to the 10 bits of TF32."""


def why_no_gpu() -> str | None:
    """Why nothing runs on CUDA here, and what would bring it; None where something does."""
    if torch.cuda.is_available():
        return None
    return "there is no CUDA device; on a machine with one, `pip install torch` brings a build for it"


def current_among(devices: Iterable[torch.device]) -> AbstractContextManager[Any]:
    """Make the GPU among some devices the current one: where graphs are recorded, and what is waited for.

    Work on another GPU than the current one is in no graph that is recorded meanwhile, and nothing says so.
    """
    gpu = next((device for device in devices if device.type == "cuda"), None)
    return nullcontext() if gpu is None else torch.cuda.device(gpu)


def rounding_of_torch(device: torch.device) -> float:
    """The relative error of torch's own products of float32 on a device, beside what float32 itself loses.

    On a GPU torch rounds the operands of convolutions to TF32 unless it is told not to, so its outputs tell nothing
    finer about those of an engine that rounds less.
    """
    if device.type != "cuda":
        return 0.0
    return TF32_TOLERANCE if any(one.fp32_precision == "tf32" for one in _settings()) else 0.0


@contextmanager
def products_in_float32(*, tf32: bool) -> Iterator[None]:
    """Let torch multiply float32 on CUDA with its operands rounded to TF32, or whole, whatever it is set to.

    Afterwards each setting is what it was. They are read and written by `fp32_precision`, since torch refuses to read
    `allow_tf32` where somebody has set the new one.
    """
    before = [one.fp32_precision for one in _settings()]
    try:
        for one in _settings():
            one.fp32_precision = "tf32" if tf32 else "ieee"
        yield
    finally:
        for one, precision in zip(_settings(), before, strict=True):
            one.fp32_precision = "none"  # takes it from the settings above it
            if one.fp32_precision != precision:
                one.fp32_precision = precision


def _settings() -> tuple[Any, ...]:
    """What holds them: for products of matrices, convolutions and recurrent layers."""
    cudnn: Any = torch.backends.cudnn
    return (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
