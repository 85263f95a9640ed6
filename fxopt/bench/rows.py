"""All the rows that a report shows of one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fxopt.bench.comparison import Comparison
from fxopt.bench.device import unavailable
from fxopt.bench.pairs import compare
from fxopt.errors import EngineError

_CUDA_ROWS: dict[str, dict[str, Any]] = {
    "": {},
    ", cold L2": {"cold_cache": True},
    ", graph replay": {"graph": True},
}


def compare_on(
    device: str,
    before: Callable[..., Any],
    after: Callable[..., Any],
    inputs: Any,
    *,
    budget_seconds: float = 10.0,
    seed: int = 0,
) -> dict[str, Comparison | str]:
    """Compare two modules on a device in every way that makes a difference there.

    On a GPU these are a warm L2 cache, a cold one, and replays of a CUDA graph; they share the budget.

    Returns:
        A comparison for each row, "cuda, cold L2" for one, or why there is none.

    Raises:
        EngineError: where a module raises.
    """
    reason = unavailable(device)
    if reason is not None:
        return {device: reason}
    ways = _CUDA_ROWS if torch.device(device).type == "cuda" else {"": {}}
    found: dict[str, Comparison | str] = {}
    for name, conditions in ways.items():
        try:
            found[device + name] = compare(
                before, after, inputs, device, budget_seconds=budget_seconds / len(ways), seed=seed, **conditions
            )
        except EngineError as error:
            if "graph" not in conditions:
                raise
            found[device + name] = str(error)
    return found
