"""Which kernel computes each layer fastest here: measured, within a budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from fxopt.engines.layer import Layer
from fxopt.engines.memory import LARGE_BYTES, hand_back
from fxopt.engines.onednn.kernels import FORMATS, KERNELS, Kernel, places

_ROUNDS = 5
_HOPELESS = 1.3
"""Kernels this much slower than the best in the first round are not timed again."""
_MOST_PRODUCTS = 5 * 10**9
"""What a layer is tried on has fewer rows than the example, where it would multiply more often than this."""


def choose(layers: Sequence[Layer], budget_seconds: float) -> list[str]:
    """The name of the fastest kernel for each layer, in order.

    Layers of the same shapes are measured once, those that compute most first; what the budget leaves out is packed.
    """
    chosen: dict[tuple[Any, ...], str] = {}
    began = time.perf_counter()
    for layer in sorted(layers, key=_cost, reverse=True):
        if layer.signature in chosen or time.perf_counter() - began > budget_seconds:
            continue
        chosen[layer.signature] = _fastest(layer)
        if layer.shape.numel() * layer.weight.element_size() >= LARGE_BYTES:
            hand_back()
    return [chosen.get(layer.signature, "packed") for layer in layers]


def fastest(candidates: dict[str, Callable[[], object]], rounds: int, budget_seconds: float) -> dict[str, float]:
    """The shortest time of each candidate in seconds, taken in turns; hopeless ones are timed once.

    All of them were called before.
    """
    best: dict[str, float] = {}
    began = time.perf_counter()
    for number in range(rounds):
        limit = _HOPELESS * min(best.values(), default=float("inf"))
        for name, call in candidates.items():
            if number and best[name] > limit:
                continue
            start = time.perf_counter()
            call()
            best[name] = min(best.get(name, float("inf")), time.perf_counter() - start)
        if time.perf_counter() - began > budget_seconds:
            break
    return best


def _fastest(layer: Layer) -> str:
    layer = _of_few_rows(layer)
    kernels = {name: kernel for name, make in KERNELS.items() if (kernel := make(layer)) is not None}
    x = _random(layer.shape, layer)
    added = layer.last.meta["tensor_meta"].shape
    given = (x,) if layer.other is None else (x, _random(torch.Size((*x.shape[:1], *added[1:])), layer))

    def caller(kernel: Kernel) -> Callable[[], object]:
        return lambda: kernel(*given)

    calls = {name: caller(kernel) for name, kernel in kernels.items()}
    for call in calls.values():
        call()
    times = fastest(calls, _ROUNDS, 0.1)
    return min(times, key=times.__getitem__)


def _of_few_rows(layer: Layer) -> Layer:
    """The layer with as much of its batch as tells its kernels apart: all of it could take a second for each call."""
    rows = layer.shape[0]
    products = layer.weight.numel() * places(layer) // max(1, rows)
    few = max(1, _MOST_PRODUCTS // max(1, products))
    return replace(layer, shape=torch.Size((few, *layer.shape[1:]))) if few < rows else layer


def _random(shape: torch.Size, layer: Layer) -> torch.Tensor:
    memory_format = FORMATS.get(layer.spatial, torch.contiguous_format)
    # Drawn uniformly, since to draw from a normal distribution takes longer than a kernel does.
    return torch.empty(shape, dtype=layer.weight.dtype, memory_format=memory_format).uniform_(-1, 1)


def _cost(layer: Layer) -> int:
    return layer.weight.numel() * layer.shape.numel()
