"""Everything that can be measured of one target, each with the reason where it can't."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fxopt.bench.cold import ColdStart
from fxopt.bench.device import measurable, unavailable
from fxopt.bench.fingerprint import Fingerprint, fingerprint
from fxopt.bench.latency import Latency, measure_latency
from fxopt.bench.profiling import Profile, profile
from fxopt.bench.roofline import Roofline, measure_roofline
from fxopt.bench.size import Size, measure_size
from fxopt.bench.surroundings import pinned
from fxopt.bench.throughput import BATCHES, Throughput, measure_throughput
from fxopt.errors import EngineError
from fxopt.target import Target


@dataclass(frozen=True)
class DeviceSurvey:
    """One device.

    Attributes:
        latency: of single calls.
        throughput: by batch size, or why there is none.
        size: with the peak memory of torch's tensors.
        reserved: bytes that torch's allocator took from a GPU at the peak; None on the CPU.
        roofline: of the machine.
        profile: where the time goes, or why that is not known.
    """

    latency: Latency
    throughput: dict[int, Throughput | str]
    size: Size
    reserved: int | None
    roofline: Roofline
    profile: Profile | str


@dataclass(frozen=True)
class Survey:
    """One target.

    Attributes:
        target: its name.
        inputs: described.
        machine: where.
        devices: by name, or why nothing was measured there.
        cold: a fresh process, or why nothing is known of one.
        notes: what was chosen for the user.
    """

    target: str
    inputs: str
    machine: Fingerprint
    devices: dict[str, DeviceSurvey | str]
    cold: ColdStart | str
    notes: tuple[str, ...]


def survey(
    target: Target,
    *,
    devices: Sequence[str] = ("cpu",),
    batches: Sequence[int] = BATCHES,
    budget_seconds: float = 10.0,
    threads: int | None = None,
    cores: Sequence[int] | None = None,
    cold: Callable[[], ColdStart] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Survey:
    """Measure a target.

    Args:
        target: what to measure.
        devices: on which.
        batches: sizes to measure the throughput at.
        budget_seconds: about how long to measure on each device.
        threads: that torch runs on the CPU; None leaves them.
        cores: that all of it is held to, the process of the cold start included; None leaves them.
        cold: measures a cold start; None where nobody asks for it.
        progress: told what begins.

    Raises:
        EngineError: where the module raises, or there are no such cores.
    """
    tell = progress or (lambda stage: None)
    machine = fingerprint()
    with contextlib.nullcontext() if cores is None else pinned(cores):
        started: ColdStart | str = "not asked for"
        if cold is not None:
            tell("cold start")
            try:
                started = cold()
            except EngineError as error:
                started = str(error)
        found: dict[str, DeviceSurvey | str] = {}
        for device in devices:
            reason = unavailable(device)
            found[device] = reason or _of_device(target, device, batches, budget_seconds, threads, tell)
    return Survey(target.name, target.inputs.describe(), machine, found, started, target.notes)


def _of_device(
    target: Target,
    device: str,
    batches: Sequence[int],
    budget: float,
    threads: int | None,
    tell: Callable[[str], None],
) -> DeviceSurvey:
    module, inputs, place = target.module, target.inputs, measurable(device)
    tell(f"latency on {device}")
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats(place)
    latency = measure_latency(module, inputs, device, budget_seconds=budget / 2, threads=threads)
    reserved = int(torch.cuda.max_memory_reserved(place)) if place.type == "cuda" else None
    tell(f"throughput on {device}")
    throughput = measure_throughput(module, inputs, device, batches=batches, budget_seconds=budget / 2, threads=threads)
    tell(f"memory on {device}")
    size = measure_size(module, inputs, device)
    tell(f"profile on {device}")
    # Floats of 8 bits are widened before they are multiplied; their own product takes minutes on a CPU.
    dtypes = [p.dtype for p in module.parameters() if p.is_floating_point() and p.dtype.itemsize > 1]
    dtype = dtypes[0] if dtypes else torch.float32
    roofline = measure_roofline(place, dtype, threads)
    profiled: Profile | str
    try:
        profiled = profile(module, inputs, device, roofline=roofline, threads=threads)
    except (EngineError, RuntimeError) as error:  # kineto is not built into every torch
        profiled = f"torch.profiler: {error}"
    return DeviceSurvey(latency, throughput, size, reserved, roofline, profiled)
