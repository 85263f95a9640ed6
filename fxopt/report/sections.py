"""What the report of a run says, in order, before anything is said of how it looks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from fxopt.record.shape import LatencyRecord, NotMeasured, Record
from fxopt.report import groups, words
from fxopt.report.section import Section, Table

_MOST_GROUPS = 8
_MOST_PLACES = 3
_MOST_GUARDS = 5
_MOST_OPAQUE = 12
_MOST_REASONS = 3
_MOST_PROOFS = 12
_MOST_LAYERS = 12


def sections(record: Record) -> list[Section]:
    """All sections of the report on a run; empty ones are left out."""
    found = [_run(record), _capture(record), _passes(record), _proofs(record), _sensitivity(record)]
    found += [_changes(record), _skips(record), _latency(record), _engines(record), _before_and_after(record)]
    return [section for section in found if section.facts or section.table or section.notes]


def _run(record: Record) -> Section:
    machine = record["machine"]
    facts = [("target", record["target"]), ("inputs", record["inputs"]), ("machine", words.machine(machine))]
    if machine.get("gpu"):
        facts.append(("", f"{machine['gpu']}, driver {machine.get('gpu_driver')}, CUDA {machine.get('cuda')}"))
    seconds = [record["capture"]["seconds"], sum(entry["seconds"] for entry in record["passes"])]
    took = [words.duration(1e3 * second) for second in (sum(seconds), *seconds)]
    facts.append(("took", f"{took[0]}: capture {took[1]}, passes {took[2]}"))
    promise = "every pass was held to its promise" if record["verified"] else "NO: outputs were not compared"
    facts.append(("verified", promise))
    facts += [("", f"but not on {inputs}") for inputs in record["uncompared"]]
    return Section("fxopt", tuple(facts))


def _capture(record: Record) -> Section:
    capture = record["capture"]
    coverage = capture["coverage"]
    sites, flops, parameters = (
        words.share(coverage["call_sites"]),
        words.share(coverage["flops"]),
        words.share(coverage["parameters"]),
    )
    shown = f"the graph shows {sites} of the call sites, {flops} of the FLOPs, {parameters} of the parameters"
    facts = [("coverage", shown)]
    opaque = [f"{one['path'] or '(root)'}: {one['reason']}{_at(one['location'])}" for one in capture["opaque"]]
    facts += _listed("opaque", opaque, _MOST_OPAQUE)
    assumed = [f"{guard['assumption']}{_at(guard['location'])}" for guard in capture["guards"]]
    facts += _listed("guards", assumed, _MOST_GUARDS)
    return Section("Capture", tuple(facts), notes=tuple(capture["notes"]))


def _passes(record: Record) -> Section:
    rows = tuple(
        (
            entry["name"],
            str(len(entry["changes"])),
            str(len(entry["skips"])),
            entry["promise"],
            words.error(entry["relative_error"]),
            words.duration(1e3 * entry["seconds"]),
        )
        for entry in record["passes"]
    )
    headings = ("pass", "changes", "skips", "promise", "relative error", "time")
    return Section("Passes", table=Table(headings, rows, right=(1, 2, 4, 5)) if rows else None)


def _proofs(record: Record) -> Section:
    """Each pass that was measured, and the places that alone were measured to cost or to pay."""
    rows, reasons = [], dict[str, list[str]]()
    for entry in record["passes"]:
        for proof in entry["proofs"]:
            outcome = "kept" if proof["kept"] else "reverted"
            if proof["reason"]:
                where = proof["where"] or words.number_of(len(proof["changes"]), "change")
                reasons.setdefault(f"{entry['name']}: {outcome}, {proof['reason']}", []).append(where)
            latency = proof["latency"]
            if latency is None or (proof["where"] and latency["verdict"] not in ("faster", "slower")):
                continue
            speedup, noise = words.speedup(latency), words.effect(latency["noise_floor"])
            rows.append((entry["name"], proof["where"] or "(the whole pass)", speedup, noise, outcome))
    notes = [groups.Group(reason, tuple(where)).shortened(_MOST_PLACES) for reason, where in reasons.items()]
    if len(rows) > _MOST_PROOFS:
        notes.append(f"{len(rows) - _MOST_PROOFS} more were measured, all in the JSON record")
    headings = ("pass", "what it did at", "speed-up [95 % interval]", "noise floor", "outcome")
    table = Table(headings, tuple(rows[:_MOST_PROOFS]), right=(3,)) if rows else None
    return Section("Proof", table=table, notes=tuple(notes))


def _sensitivity(record: Record) -> Section:
    """The layers that cost the most by being quantised."""
    rows = [
        (
            one["name"],
            words.decibels(one["sqnr_db"]),
            "-" if one["seconds"] is None else words.duration(1e3 * one["seconds"]),
            "float" if one["kept"] else entry["name"],
        )
        for entry in record["passes"]
        for one in entry["sensitivity"]
    ]
    notes = (f"{len(rows) - _MOST_LAYERS} more cost less, all in the JSON record",) if len(rows) > _MOST_LAYERS else ()
    headings = ("layer", "SQNR with it alone quantised", "its time as a float", "is now")
    return Section(
        "Sensitivity", table=Table(headings, tuple(rows[:_MOST_LAYERS]), (1, 2)) if rows else None, notes=notes
    )


def _changes(record: Record) -> Section:
    facts = []
    for entry in record["passes"]:
        facts += _grouped(entry["name"], groups.changes(entry))
    return Section("Changes", tuple(facts))


def _skips(record: Record) -> Section:
    facts = []
    for entry in record["passes"]:
        facts += _grouped(entry["name"], groups.skips(entry))
    return Section("Left alone", tuple(facts))


def _latency(record: Record) -> Section:
    rows, notes = [], []
    for device, either in record["latency"].items():
        if "not_measured" in either:
            reason = cast(NotMeasured, either)["not_measured"]
            rows.append((device, "-", "-", f"not measured: {reason}", "", "", ""))
            continue
        found: LatencyRecord = either
        rows.append(
            (
                device,
                words.duration(found["before_ms"]),
                words.duration(found["after_ms"]),
                words.speedup(found),
                found["verdict"],
                words.effect(found["noise_floor"]),
                str(found["pairs"]),
            )
        )
        notes += [f"{device}: {note}" for note in found["notes"]]
    headings = ("device", "before", "after", "speed-up [95 % interval]", "verdict", "noise floor", "pairs")
    return Section("Latency", table=Table(headings, tuple(rows), (1, 2, 5, 6)) if rows else None, notes=tuple(notes))


def _engines(record: Record) -> Section:
    found = record.get("engines")
    if found is None:
        return Section("Engines")
    rows, notes, dropped = [], [], dict[str, list[str]]()
    for index, rung in enumerate(found["rungs"]):
        name, latency, seconds = rung["label"], rung["latency"], rung["build_seconds"]
        if latency is None:
            dropped.setdefault(rung["dropped"], []).append(name)
            continue
        rows.append(
            (
                f"{name} *" if index == found["chosen"] else name,
                words.duration(latency["after_ms"]),
                words.speedup(latency),
                latency["verdict"],
                words.error(rung["relative_error"]),
                "-" if seconds is None else words.duration(1e3 * seconds),
                words.size(rung["resident_bytes"]),
            )
        )
        notes += [
            f"{name}: {group.shortened(_MOST_PLACES)}" for group in groups.reasons(rung["reasons"])[:_MOST_REASONS]
        ]
    headings = ("engine", "latency", "speed-up [95 % interval]", "verdict", "relative error", "build", "memory")
    chosen = "* is what was chosen; " if found["chosen"] is not None else ""
    notes.insert(0, f"{chosen}all are held against the original on {found['device']}")
    notes += [f"{', '.join(names)} dropped out: {why}" for why, names in dropped.items()]
    return Section("Engines", table=Table(headings, tuple(rows), (1, 4, 5, 6)), notes=tuple(notes))


def _before_and_after(record: Record) -> Section:
    rows = tuple(_metric_rows(record)) + tuple(_size_rows(record)) + tuple(_device_rows(record))
    headings = ("", "before", "after", "change")
    return Section("Before and after", table=Table(headings, rows, right=(1, 2, 3)) if rows else None)


def _metric_rows(record: Record) -> Iterator[tuple[str, ...]]:
    before, after = record["metrics"]["before"] or {}, record["metrics"]["after"] or {}
    for name in dict.fromkeys([*before, *after]):
        one, two = before.get(name), after.get(name)
        yield name, words.metric(one), words.metric(two), words.difference(one, two)


def _size_rows(record: Record) -> Iterator[tuple[str, ...]]:
    before, after = record["memory"]["before"], record["memory"]["after"]
    if before is None or after is None:
        return
    yield _row("parameters", before["parameters"], after["parameters"], words.count)
    yield _row("FLOPs", before["flops"], after["flops"], words.count)
    yield _row("size", before["bytes"], after["bytes"], words.size)
    if not any("peak_bytes" in found for found in record["latency"].values()):
        yield _row("peak memory", before["peak_bytes"], after["peak_bytes"], words.size)


def _device_rows(record: Record) -> Iterator[tuple[str, ...]]:
    for device, latency in record["latency"].items():
        if "not_measured" in latency:
            continue
        found: LatencyRecord = latency
        peak, first, wall = found["peak_bytes"], found["first_call_ms"], found["wall_ms"]
        yield _row(f"peak memory, {device}", peak["before"], peak["after"], words.size)
        yield _row(f"first call, {device}", first["before"], first["after"], words.duration)
        if wall is not None:
            yield _row(f"wall time, {device}", wall["before"], wall["after"], words.duration)
        if (clocks := found["clocks_mhz"]) is not None:
            yield _row(f"clock in MHz, {device}", clocks["before"], clocks["after"], words.count)


def _row(name: str, before: float | None, after: float | None, written: Callable[[Any], str]) -> tuple[str, ...]:
    return name, written(before), written(after), words.relative(before, after)


def _grouped(name: str, found: Sequence[groups.Group]) -> list[tuple[str, str]]:
    return _listed(name, [group.shortened(_MOST_PLACES) for group in found], _MOST_GROUPS)


def _listed(label: str, texts: Sequence[str], most: int) -> list[tuple[str, str]]:
    """A label with the first texts under it, and how many there are besides."""
    shown = list(texts[:most])
    if len(texts) > most:
        shown.append(f"and {len(texts) - most} more, all in the JSON record")
    return [(label if index == 0 else "", text) for index, text in enumerate(shown)]


def _at(location: str) -> str:
    return f" ({location})" if location else ""
