"""The shape of a record, as Python types. `record.schema.json` says the same to other programs."""

from __future__ import annotations

from typing import Any, TypeAlias, TypedDict

Number: TypeAlias = "float | str"
"""A float, or "nan", "inf", "-inf"."""


class ChangeRecord(TypedDict):
    """One rewrite: what was done, to what, and the user's line."""

    what: str
    where: str
    source: str


class SkipRecord(TypedDict):
    """One place that was left alone, why, and the user's line."""

    where: str
    reason: str
    source: str


class PassRecord(TypedDict):
    """One pass of the run; `relative_error` is null where its outputs were not compared.

    `changes` are those that stand. `proofs` has the whole pass first, then single places, where that was asked for;
    `sensitivity` the layers that it quantised, the costliest first.
    """

    name: str
    options: dict[str, Any]
    seconds: float
    changes: list[ChangeRecord]
    skips: list[SkipRecord]
    promise: str
    relative_error: Number | None
    proofs: list[ProofRecord]
    sensitivity: list[SensitivityRecord]


class CoverageRecord(TypedDict):
    """Shares of the module that the graphs show, each from 0 to 1."""

    call_sites: float
    flops: float
    parameters: float


class OpaqueRecord(TypedDict):
    """A submodule that stays as it is, and why."""

    path: str
    reason: str
    location: str


class GuardRecord(TypedDict):
    """Something that capture assumed about the inputs."""

    assumption: str
    location: str


class CaptureRecord(TypedDict):
    """What capture found, in so many seconds."""

    seconds: float
    coverage: CoverageRecord
    opaque: list[OpaqueRecord]
    guards: list[GuardRecord]
    notes: list[str]


class TimesRecord(TypedDict):
    """Raw times in seconds a call; `again` is a copy of the module before."""

    before: list[float]
    after: list[float]
    again: list[float]


class LatencyRecord(TypedDict):
    """One comparison; see `fxopt.bench.Comparison` for what each number means."""

    before_ms: float
    after_ms: float
    ratio: float
    low: float
    high: float
    verdict: str
    noise_floor: Number
    margin: float
    pairs: int
    calls: int
    preempted: float | None
    threads: int
    first_call_ms: dict[str, float]
    peak_bytes: dict[str, int | None]
    wall_ms: dict[str, float] | None
    clocks_mhz: dict[str, float] | None
    seconds: float
    times: TimesRecord
    notes: list[str]


class ProofRecord(TypedDict):
    """What measuring said of a pass (`where` is empty then) or of what it did at one place.

    `latency` holds the module without it against the module with it; null where that was not measured.
    """

    where: str
    kept: bool
    reason: str
    changes: list[ChangeRecord]
    latency: LatencyRecord | None


class SensitivityRecord(TypedDict):
    """What quantising one layer alone costs; `kept` says whether it stays a float. `seconds` are those of the float."""

    name: str
    sqnr_db: Number
    seconds: float | None
    kept: bool


class NotMeasured(TypedDict):
    """Why there is no latency for a device."""

    not_measured: str


class SizeRecord(TypedDict):
    """Size of a module and cost of a forward; see `fxopt.bench.Size`."""

    parameters: int
    buffers: int
    bytes: int
    flops: int | None
    peak_bytes: int | None


class MemoryRecord(TypedDict):
    """Sizes of the original and of the result; null where not measured."""

    before: SizeRecord | None
    after: SizeRecord | None


class MetricsRecord(TypedDict):
    """What the user's `evaluate` gave for the original and for the result; null where there is none."""

    before: dict[str, Number] | None
    after: dict[str, Number] | None


class RungRecord(TypedDict):
    """One engine: what it made of the module, or why it dropped out; null where that is not known.

    `label` is what reports call it: `engine` with `options`, `in_floats` where quantisers were left out, and `passes`,
    the spec of what rewrote the module further for it. `latency` holds the original module against it.
    """

    label: str
    engine: str
    options: dict[str, Any]
    passes: str
    in_floats: bool
    build_seconds: float | None
    relative_error: Number | None
    resident_bytes: int | None
    latency: LatencyRecord | None
    reasons: list[SkipRecord]
    choices: dict[str, Any]
    dropped: str


class EnginesRecord(TypedDict):
    """Engines held against each other; `chosen` is the index of a rung, or null."""

    asked: str
    device: str
    chosen: int | None
    max_error: Number | None
    budget_seconds: float
    seconds: float
    rungs: list[RungRecord]


class Record(TypedDict):
    """One run."""

    schema: str
    target: str
    inputs: str
    machine: dict[str, Any]
    capture: CaptureRecord
    passes: list[PassRecord]
    verified: bool
    uncompared: list[str]
    latency: dict[str, LatencyRecord | NotMeasured]
    memory: MemoryRecord
    metrics: MetricsRecord
    engines: EnginesRecord | None
