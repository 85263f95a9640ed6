"""Each part of a record, from the frozen result that it tells of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from fxopt.bench.comparison import BeforeAfter, Comparison
from fxopt.bench.fingerprint import Fingerprint
from fxopt.bench.size import Size
from fxopt.capture.captured import Captured
from fxopt.engines.ladder import Ladder
from fxopt.inputs import Inputs
from fxopt.ledger import Ledger, LedgerEntry
from fxopt.record.plain import number, plain
from fxopt.record.shape import (
    CaptureRecord,
    EnginesRecord,
    LatencyRecord,
    MemoryRecord,
    MetricsRecord,
    NotMeasured,
    PassRecord,
    ProofRecord,
    Record,
    RungRecord,
    SizeRecord,
    TimesRecord,
)
from fxopt.record.version import SCHEMA


def build(
    *,
    target: str,
    inputs: Inputs,
    machine: Fingerprint,
    captured: Captured,
    ledger: Ledger,
    verified: bool,
    latency: Mapping[str, Comparison | str] | None = None,
    memory: BeforeAfter[Size] | None = None,
    metrics: BeforeAfter[Mapping[str, float]] | None = None,
    engines: Ladder | None = None,
) -> Record:
    """Make the record of a run.

    Args:
        target: what was optimized, as the user would name it.
        inputs: that it was captured and timed with.
        machine: where.
        captured: the module as a graph, for what capture has to say of it.
        ledger: what each pass did, in order, and on which inputs that could not be verified.
        verified: whether every pass was held to its promise.
        latency: by device; a text says why there is none.
        memory: sizes of the original and of the result.
        metrics: what the user's `evaluate` gave for either.
        engines: that were held against each other.
    """
    return Record(
        schema=SCHEMA,
        target=target,
        inputs=inputs.describe(),
        machine=plain(asdict(machine)),
        capture=of_capture(captured),
        passes=[of_entry(entry) for entry in ledger],
        verified=verified,
        uncompared=list(ledger.uncompared),
        latency={
            device: NotMeasured(not_measured=found) if isinstance(found, str) else of_comparison(found)
            for device, found in (latency or {}).items()
        },
        memory=MemoryRecord(
            before=None if memory is None else of_size(memory.before),
            after=None if memory is None else of_size(memory.after),
        ),
        metrics=MetricsRecord(
            before=None if metrics is None else plain(metrics.before),
            after=None if metrics is None else plain(metrics.after),
        ),
        engines=None if engines is None else of_ladder(engines),
    )


def of_capture(captured: Captured) -> CaptureRecord:
    """The part that tells of capture."""
    constants = [
        f"{constant.name}: {constant.description}, read but not registered, became a buffer ({constant.location})"
        for constant in captured.constants
    ]
    return CaptureRecord(
        seconds=captured.seconds,
        coverage=plain(asdict(captured.coverage)),
        opaque=_plain(captured.opaque),
        guards=_plain(captured.guards),
        notes=[*captured.notes, *constants],
    )


def of_entry(entry: LedgerEntry) -> PassRecord:
    """The part that tells of one pass."""
    return PassRecord(
        name=entry.pass_name,
        options=plain(entry.options),
        seconds=entry.seconds,
        changes=_plain(entry.changes),
        skips=_plain(entry.skips),
        promise=entry.promise,
        relative_error=plain(entry.relative_error),
        proofs=[
            ProofRecord(
                where=proof.where,
                kept=proof.kept,
                reason=proof.reason,
                changes=_plain(proof.changes),
                latency=None if proof.latency is None else of_comparison(proof.latency),
            )
            for proof in entry.proofs
        ],
        sensitivity=_plain(entry.ranking),
    )


def _plain(found: Iterable[Any]) -> Any:
    """Frozen results whose fields are those of the record."""
    return [plain(asdict(one)) for one in found]


def of_comparison(comparison: Comparison) -> LatencyRecord:
    """The latency on one device. Raw times are kept to the nanosecond."""
    first, peak, wall = comparison.first_call, comparison.peak_memory, comparison.wall_ms
    clocks = comparison.clocks
    return LatencyRecord(
        before_ms=comparison.before_ms,
        after_ms=comparison.after_ms,
        ratio=comparison.ratio,
        low=comparison.low,
        high=comparison.high,
        verdict=str(comparison.verdict),
        noise_floor=number(comparison.noise_floor),
        margin=comparison.margin,
        pairs=comparison.pairs,
        calls=comparison.calls,
        preempted=comparison.preempted,
        threads=comparison.threads,
        first_call_ms={"before": 1e3 * first.before, "after": 1e3 * first.after},
        peak_bytes={"before": peak.before, "after": peak.after},
        wall_ms=None if wall is None else {"before": wall.before, "after": wall.after},
        clocks_mhz=None if clocks is None else {"before": clocks.before.sm_mhz, "after": clocks.after.sm_mhz},
        seconds=comparison.seconds,
        times=TimesRecord(
            before=[round(time, 9) for time in comparison.times.before],
            after=[round(time, 9) for time in comparison.times.after],
            again=[round(time, 9) for time in comparison.times.again],
        ),
        notes=list(comparison.notes),
    )


def of_ladder(ladder: Ladder) -> EnginesRecord:
    """Engines, and which was chosen."""
    return EnginesRecord(
        asked=ladder.asked,
        device=ladder.device,
        chosen=next((index for index, rung in enumerate(ladder.rungs) if rung is ladder.chosen), None),
        max_error=plain(ladder.max_error),
        budget_seconds=ladder.budget_seconds,
        seconds=ladder.seconds,
        rungs=[
            RungRecord(
                label=rung.label,
                engine=rung.engine,
                options=plain(rung.options),
                passes=rung.passes,
                in_floats=rung.in_floats,
                build_seconds=rung.build_seconds,
                relative_error=plain(rung.relative_error),
                resident_bytes=rung.resident_bytes,
                latency=None if rung.comparison is None else of_comparison(rung.comparison),
                reasons=_plain(rung.reasons),
                choices=plain(rung.executable.choices) if rung.executable is not None else {},
                dropped=rung.dropped,
            )
            for rung in ladder.rungs
        ],
    )


def of_size(size: Size) -> SizeRecord:
    """The size of one module."""
    return SizeRecord(
        parameters=size.parameters,
        buffers=size.buffers,
        bytes=size.bytes,
        flops=size.flops,
        peak_bytes=size.peak_memory,
    )
