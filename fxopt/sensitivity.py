"""Which layer costs the most by being quantised: each one alone, against the module without any rounding."""

from __future__ import annotations

import copy
import io
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from fxopt.batches import run_batches, several, unaffected
from fxopt.errors import PassError
from fxopt.graph import GraphModule, Program
from fxopt.inputs import Inputs
from fxopt.modules import FakeQuantize, QuantizedMultiheadAttention
from fxopt.nested import tensors_in

_RUNS = 5
_ALIKE_DB = 30.0
"""What a run in float64 and one in float32 agree by at least, where they compute the same."""


@dataclass(frozen=True)
class Sensitivity:
    """What quantising one layer costs.

    Attributes:
        name: its qualified name.
        sqnr_db: signal to quantisation noise of the module's outputs with this layer's quantisers alone, in dB: the
            lower, the more it costs. Infinite where they change nothing.
        seconds: that the layer takes of a call as a float; None where it is no module.
        kept: whether it stays a float.
    """

    name: str
    sqnr_db: float
    seconds: float | None = None
    kept: bool = False


def sensitivity(module: nn.Module, data: Iterable[Any]) -> tuple[Sensitivity, ...]:
    """Rank the quantised layers of a calibrated module, the costliest first.

    Outputs are compared with those of the module in float64 without any rounding. The module stays as it is.

    Args:
        module: captured, and what 'qat' or 'ptq' has been through, calibrated.
        data: batches of inputs, each a tensor, a tuple of positional or a dict of keyword arguments.

    Raises:
        PassError: where there is nothing to rank, no data, or data that the module can't take.
    """
    trial = copy.deepcopy(module).eval()
    layers = {name: found for name, fakes in _by_layer(trial).items() if (found := [f for f in fakes if f.ready])}
    batches = [Inputs.of(batch) for batch in several("sensitivity", data)]
    if not layers:
        raise PassError("sensitivity: no quantiser has a range; put 'qat' or 'ptq' in, and calibrate")
    if not batches:
        raise PassError("sensitivity: the data is empty; give an iterable of inputs")
    _round(trial, False)
    wanted = _exact(trial, batches)
    seconds = _seconds(trial, batches[0], layers)
    ranked = []
    for name, fakes in layers.items():
        for fake in fakes:
            fake.ready = True
        ranked.append(Sensitivity(name, _sqnr(_outputs(trial, batches), wanted), seconds.get(name)))
        _round(trial, False)
    return tuple(sorted(ranked, key=lambda one: one.sqnr_db))


def _by_layer(module: nn.Module) -> dict[str, list[FakeQuantize]]:
    """The quantisers of each layer: in it, and before what it reads; of a value that no layer reads, what gives it."""
    found: dict[str, list[FakeQuantize]] = defaultdict(list)
    modules = dict(module.named_modules())
    placed: set[FakeQuantize] = set()
    for region in Program(module).regions if isinstance(module, GraphModule) else ():
        for node in region.graph.nodes:
            fake = region.submodule(node) if node.op == "call_module" else None
            if not isinstance(fake, FakeQuantize):
                continue
            placed.add(fake)
            readers = [user for user in _readers(node) if user.op != "output"] or list(node.all_input_nodes)
            for reader in readers:
                found[region.qualified(reader)].append(fake)
    for name, child in modules.items():
        if isinstance(child, FakeQuantize) and child not in placed:
            owner = name.rpartition(".")[0]
            above = owner.rpartition(".")[0]
            found[above if isinstance(modules[above], QuantizedMultiheadAttention) else owner].append(child)
    return found


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What uses a value, beyond what only transposes it."""
    for user in node.users:
        moves = user.target in ("t", "transpose", torch.t, torch.transpose, getattr)
        yield from _readers(user) if moves else (user,)


def _round(module: nn.Module, on: bool) -> None:
    for child in module.modules():
        if isinstance(child, FakeQuantize):
            child.ready = on  # else it passes on what it is given


def _exact(module: nn.Module, batches: list[Inputs]) -> torch.Tensor:
    narrow = _outputs(module, batches)
    try:
        with redirect_stderr(io.StringIO()):  # torch.fx prints an error before it raises it
            wide = _outputs(copy.deepcopy(module).double(), [batch.double() for batch in batches])
    except PassError:  # a dtype that is written out in the user's code
        return narrow
    # Random numbers are others in float64, and values may decide otherwise.
    return wide if wide.shape == narrow.shape and _sqnr(narrow, wide) > _ALIKE_DB else narrow


@torch.no_grad()
def _outputs(module: nn.Module, batches: list[Inputs]) -> torch.Tensor:
    values: list[torch.Tensor] = []

    def run(batch: Inputs) -> None:
        values.extend(tensor.double().flatten() for tensor in tensors_in(batch.call(module)))

    with unaffected(module):
        run_batches("sensitivity", batches, run)
    return torch.cat(values)


def _sqnr(found: torch.Tensor, wanted: torch.Tensor) -> float:
    known = wanted.isfinite()  # scores that a mask rules out are -inf in both
    found, wanted = found[known], wanted[known]
    noise = (found - wanted).square().sum().nan_to_num(nan=math.inf)
    return math.inf if noise == 0 else float(10 * torch.log10(wanted.square().sum() / noise))


def _seconds(module: nn.Module, batch: Inputs, names: Iterable[str]) -> Mapping[str, float]:
    """The least time of each layer that is a module, over some calls of all."""
    modules = dict(module.named_modules())
    with _timed({name: modules[name] for name in names if name in modules}) as times, torch.no_grad():
        runs = []
        for _ in range(_RUNS):
            times.clear()
            batch.map(torch.clone).call(module)
            runs.append(dict(times))
    return {name: min(run[name] for run in runs) for name in runs[0]}


@contextmanager
def _timed(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, float]]:
    times: dict[str, float] = defaultdict(float)
    with ExitStack() as hooks:
        for name, layer in layers.items():
            began: list[float] = []

            def start(*_: Any, began: list[float] = began) -> None:
                began.append(time.perf_counter())

            def stop(*_: Any, name: str = name, began: list[float] = began) -> None:
                times[name] += time.perf_counter() - began.pop()

            hooks.enter_context(layer.register_forward_pre_hook(start))
            hooks.enter_context(layer.register_forward_hook(stop))
        yield times
