"""What each kernel of each layer takes, and the ways to run a graph that follow from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from fxopt.engines.contract import Run
from fxopt.engines.layer import Layer
from fxopt.engines.shortest import caller, shortest
from fxopt.engines.sparse.found import Found, zeros
from fxopt.engines.sparse.kernels import FIRST, Make, tables
from fxopt.engines.sparse.layout import to_features_first, to_features_last
from fxopt.inputs import Inputs

_LAYER_SECONDS, _WHOLE_SECONDS = 0.2, 2.0
_FAR = 1.5
Plan = dict[str, str]
"""The kernel of each layer, by its key."""
Times = Mapping[str, Mapping[str, float]]
"""Seconds by the key of a layer, then by kernel; `borders` is what leads there and back for features first."""


def layer_times(found: Found, without: Sequence[str], seconds: float) -> Times:
    """Each layer with each kernel that applies but those in `without`, the largest layers first.

    Once `seconds` are over, what was not measured yet is given as dense.
    """
    known: dict[Any, dict[str, float]] = {}
    result = {}
    began = time.perf_counter()
    for key, layer in sorted(found.named.items(), key=lambda item: -item[1].weight.numel()):
        signature = (layer.signature, round(20 * zeros(layer)), key in found.stays_last)
        if signature not in known:
            late = time.perf_counter() - began > seconds
            last, first = tables(layer.weight.device.type)
            using = (last,) if key in found.stays_last else (last, first)
            known[signature] = {"dense": 0.0} if late else _times(layer, using, without)
        result[key] = known[signature]
    return result


def plans(times: Times) -> dict[str, Plan]:
    """Plans that may be the fastest one, by name, each once.

    Alone a layer finds its weight in the cache, as it may not within a whole graph, where small weights then count for
    more: so each kernel is also taken wherever it applies, unless it is slower by far.
    """
    made = {
        "dense": {key: _least(each, lambda name: name not in FIRST) for key, each in times.items()},
        # What a region of sparse layers costs, and what one alone does that pays for both of its borders.
        "within": {key: _least(each) for key, each in times.items()},
        "alone": {key: _least(_with_borders(each)) for key, each in times.items()},
    }
    best = _sum(made["within"], times)
    for kernel in dict.fromkeys(name for each in times.values() for name in each if name not in ("dense", "borders")):
        plan = {key: kernel if kernel in each else _least(each) for key, each in times.items()}
        if _sum(plan, times) <= _FAR * best:
            made[kernel] = plan
    different: dict[str, Plan] = {}
    for name, plan in made.items():
        if plan not in different.values():
            different[name] = plan
    return different


def run_times(runs: Mapping[str, Run], inputs: Inputs) -> dict[str, float]:
    """Seconds of each way to run a whole graph."""
    return shortest({name: caller(run, inputs) for name, run in runs.items()}, _WHOLE_SECONDS)


def _times(layer: Layer, using: Sequence[Mapping[str, Make]], without: Sequence[str]) -> dict[str, float]:
    weight = layer.weight
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
        x = weight.new_empty(layer.shape).normal_()
        out = weight.new_empty(*layer.shape[:-1], len(weight)).normal_()
    given = (x,) if layer.other is None else (x, out)
    calls: dict[str, Callable[[], object]] = {}
    for table in using:
        arguments = tuple(map(to_features_first, given)) if table is FIRST else given
        for name, make in table.items():
            kernel = None if name in without else make(layer)
            if kernel is not None:
                calls[name] = lambda kernel=kernel, arguments=arguments: kernel(*arguments)  # type: ignore[misc]
    first = to_features_first(out)
    calls["borders"] = lambda: (to_features_first(x), to_features_last(first, x))
    return shortest(calls, _LAYER_SECONDS)


def _least(times: Mapping[str, float], among: Callable[[str], bool] = lambda name: True) -> str:
    return min((name for name in times if name != "borders" and among(name)), key=times.__getitem__)


def _sum(plan: Plan, times: Times) -> float:
    return sum(times[key][kernel] for key, kernel in plan.items())


def _with_borders(times: Mapping[str, float]) -> dict[str, float]:
    borders = times.get("borders", 0.0)
    return {name: seconds + (borders if name in FIRST else 0.0) for name, seconds in times.items()}
