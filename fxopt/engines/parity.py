"""How a quantised model that an engine runs agrees with its simulation, in words for a report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from fxopt.contract import Skip


def agreement(pairs: Sequence[tuple[Any, Any]], file_bytes: int | None) -> Skip:
    """How many choices are the same, how large the noise is, and how large the file.

    Args:
        pairs: an output of the simulation, and that of the engine.
        file_bytes: of the file that holds the integers; None where the engine reads none.
    """
    choices, signal, noise = list[bool](), 0.0, 0.0
    for simulated, deployed in pairs:
        if not isinstance(simulated, torch.Tensor) or simulated.shape != deployed.shape:
            continue
        wanted, found = (value.detach().cpu().double() for value in (simulated, deployed))
        known = wanted.isfinite()  # scores that a mask rules out are -inf in both
        signal += float(wanted[known].square().sum())
        noise += float((wanted - found)[known].square().sum())
        if wanted.dim() > 1 and wanted.numel():
            classes = 1 if wanted.dim() > 3 else -1  # of each pixel of an image, of each row or token of others
            choices += (wanted.argmax(classes) == found.argmax(classes)).flatten().tolist()
    parts = [f"argmax equal in {sum(choices) / len(choices):.1%}"] if choices else []
    ratio = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf
    parts.append("outputs equal" if ratio == math.inf else f"SQNR {ratio:.1f} dB")
    size = "" if file_bytes is None else f"; its file has {file_bytes / 1024:,.0f} KiB"
    return Skip("", f"against the simulation: {', '.join(parts)}{size}")
