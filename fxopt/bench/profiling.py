"""Where the time of a module goes: by operator and by submodule, held against what the machine can do."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, record_function

from fxopt.bench.arm import Arm
from fxopt.bench.device import measurable
from fxopt.bench.operators import Operator, operators_of
from fxopt.bench.roofline import Roofline
from fxopt.bench.surroundings import quiet, visible_operators
from fxopt.inputs import Inputs

_CALLS = 20
_LEVEL = "KINETO_LOG_LEVEL"
_CALL = "fxopt.call"
_MODULE = "fxopt.module:"


@dataclass(frozen=True)
class Cost:
    """What one operator, or one submodule by itself, takes of a call.

    Attributes:
        name: `aten::addmm`, or the qualified name of the submodule; "" is the module itself.
        kind: class of the submodule; "" for an operator.
        calls: how often it runs in one call.
        seconds: that it takes in one call, while the profiler looks on.
        share: of the whole call.
        flops: of one call; None where torch knows no formula for it.
        bytes: that it reads and writes in one call; None where the operators could not be followed.
        roofline: share of what the machine could do at best; above 1 the operands came from a cache. None where
            the bytes are not known, or nothing is computed or moved.
    """

    name: str
    kind: str
    calls: float
    seconds: float
    share: float
    flops: int | None
    bytes: int | None
    roofline: float | None


@dataclass(frozen=True)
class Profile:
    """Where the time of one call goes.

    Attributes:
        seconds: of the mean call, with the profiler looking on.
        operators: costliest first, in the quicker half of some calls; with `python` they are the whole.
        modules: costliest first, each without the submodules in it.
        python: seconds outside of any operator.
        allocated: bytes that torch's allocator held at the peak of a call beyond what it held before, scratch space
            included.
        notes: what could not be told, and why.
    """

    seconds: float
    operators: tuple[Cost, ...]
    modules: tuple[Cost, ...]
    python: float
    allocated: int
    notes: tuple[str, ...] = ()


def profile(
    module: nn.Module,
    inputs: Any,
    device: torch.device | str = "cpu",
    *,
    roofline: Roofline,
    threads: int | None = None,
) -> Profile:
    """Profile a module, on a copy of it; torch.nn's encoder layers run operator by operator for it.

    Args:
        module: in the mode that is to be profiled.
        inputs: a tensor, a tuple of positional arguments, a dict of keyword ones, or `Inputs`.
        device: "cpu", "cuda" or "cuda:1". On a GPU times are those of its kernels.
        roofline: of this device.
        threads: that torch runs meanwhile; None leaves them.

    Raises:
        EngineError: where the device is not there, or the module raises.
    """
    place = measurable(device)
    given = Inputs.of(inputs)
    gpu = place.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with quiet(place, threads):
        arm = Arm("module", module, given, place)
        arm.keep_inputs(given)
        arm.under(lambda call: call())
        with visible_operators():
            listed = arm.watched(operators_of)
            # Keeping events is what one cycle does anyway; not asked for it, torch 2.11 warns that the next loses them.
            profiling = torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True)
            with _unheard(), _named(arm.module), profiling as profiler:
                for _ in range(_CALLS):
                    arm.under(_recorded)
        if gpu:
            torch.cuda.synchronize(place)
    calls = [event for event in profiler.events() if event.name == _CALL and event.cpu_parent is None]
    # The quicker half: what else ran on the machine is in the others.
    calls = sorted(calls, key=lambda call: float(call.time_range.elapsed_us()))[: _CALLS // 2]
    walk = _Walk(gpu)
    notes = []
    if listed is None or not all(walk.follow(call, listed) for call in calls):
        notes.append("FLOPs and bytes: the operators that ran are not those that a look at the module shows")
        walk = _Walk(gpu)
        for call in calls:
            walk.follow(call, None)
    kinds = {name: type(child).__name__ for name, child in module.named_modules()}
    total = walk.total / len(calls)
    operators = _costs(walk.operators, {}, len(calls), total, roofline)
    modules = _costs(walk.modules, kinds, len(calls), total, roofline)
    return Profile(
        seconds=total,
        operators=operators,
        modules=modules,
        python=max(0.0, total - sum(cost.seconds for cost in operators)),
        allocated=_peak(profiler, "CUDA" if gpu else "CPU"),
        notes=tuple(notes),
    )


def _recorded(call: Callable[[], object]) -> None:
    with record_function(_CALL):
        call()


@contextlib.contextmanager
def _unheard() -> Iterator[None]:
    """Keep the profiler's library from telling on stderr that it starts and stops; it reads the level only once."""
    before = os.environ.get(_LEVEL)
    os.environ.setdefault(_LEVEL, "6")
    try:
        yield
    finally:
        if before is None:
            del os.environ[_LEVEL]


@contextlib.contextmanager
def _named(module: Callable[..., Any]) -> Iterator[None]:
    """Let the profiler see which submodule runs."""
    open_records: list[Any] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            record = record_function(_MODULE + name)
            record.__enter__()
            open_records.append(record)

        return hook

    def leave(*_: Any) -> None:
        open_records.pop().__exit__(None, None, None)

    with contextlib.ExitStack() as hooks:
        for name, child in module.named_modules() if isinstance(module, nn.Module) else ():
            hooks.enter_context(child.register_forward_pre_hook(enter(name)))
            hooks.enter_context(child.register_forward_hook(leave))
        yield


@dataclass
class _Sum:
    calls: int = 0
    seconds: float = 0.0
    flops: int | None = None
    bytes: int | None = None
    shortest: list[tuple[int, int]] = field(default_factory=list)

    def add(self, seconds: float, operator: Operator | None) -> None:
        self.seconds += seconds
        if operator is None:
            return
        self.bytes = (self.bytes or 0) + operator.bytes
        if operator.flops is not None:
            self.flops = (self.flops or 0) + operator.flops
        self.shortest.append((operator.flops or 0, operator.bytes))


_WATCHED = {"aten::_reshape_alias": "aten::view", "aten::add_": "aten::add"}
"""What torch calls by itself in place of an operator while operators are watched: in a reshape, and for a bias."""


class _Walk:
    """Goes through the profiler's events along with the operators that are known to run."""

    def __init__(self, gpu: bool):
        self._gpu = gpu
        self.operators: dict[str, _Sum] = defaultdict(_Sum)
        self.modules: dict[str, _Sum] = defaultdict(_Sum)
        self.total = 0.0
        self._listed: list[Operator] | None = None
        self._next = 0

    def follow(self, call: Any, listed: list[Operator] | None) -> bool:
        """Take one call in; whether all the listed operators were met, in order."""
        self._listed, self._next = listed, 0
        self.total += self._seconds(call)
        for child in _ordered(call):
            self._visit(child, None)
        return listed is None or self._next == len(listed)

    def _visit(self, event: Any, owner: str | None) -> None:
        if event.name.startswith(_MODULE):
            inside = event.name.removeprefix(_MODULE)
            own = self.modules[inside]
            own.calls += 1
            own.seconds += self._seconds(event)
            if owner is not None:
                self.modules[owner].seconds -= self._seconds(event)
            for child in _ordered(event):
                self._visit(child, inside)
            return
        if self._listed is None:
            if event.name != "[memory]":
                self._take(event, None, owner)
        elif self._next < len(self._listed) and self._listed[self._next].name in (event.name, _WATCHED.get(event.name)):
            self._next += 1
            self._take(event, self._listed[self._next - 1], owner)
        else:
            for child in _ordered(event):
                self._visit(child, owner)

    def _take(self, event: Any, operator: Operator | None, owner: str | None) -> None:
        total = self.operators[event.name]
        total.calls += 1
        total.add(self._seconds(event), operator)
        if owner is not None:
            self.modules[owner].add(0.0, operator)

    def _seconds(self, event: Any) -> float:
        return float(event.device_time_total if self._gpu else event.time_range.elapsed_us()) / 1e6


def _ordered(event: Any) -> list[Any]:
    return sorted(event.cpu_children, key=lambda child: child.time_range.start)


def _costs(
    sums: dict[str, _Sum], kinds: dict[str, str], calls: int, total: float, roofline: Roofline
) -> tuple[Cost, ...]:
    costs = []
    for name, found in sums.items():
        least = sum(roofline.shortest(flops, traffic) for flops, traffic in found.shortest)
        costs.append(
            Cost(
                name=name,
                kind=kinds.get(name, ""),
                calls=found.calls / calls,
                seconds=found.seconds / calls,
                share=found.seconds / calls / total if total else 0.0,
                flops=None if found.flops is None else found.flops // calls,
                bytes=None if found.bytes is None else found.bytes // calls,
                roofline=least / found.seconds if least and found.seconds > 0 else None,
            )
        )
    return tuple(sorted(costs, key=lambda cost: -cost.seconds))


def _peak(profiler: Any, device: str) -> int:
    """The highest sum of what was allocated and not yet freed, over all calls."""
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type().name == device:
            held += event.nbytes()
            peak = max(peak, held)
    return peak
