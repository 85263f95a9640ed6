"""What the report of `fxopt bench` says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fxopt.bench.latency import TAILS
from fxopt.report import words
from fxopt.report.section import Section, Table

_MOST_ROWS = 12


def survey_sections(record: Mapping[str, Any]) -> list[Section]:
    """All sections of the report on one target."""
    facts = [("target", record["target"]), ("inputs", record["inputs"]), ("machine", words.machine(record["machine"]))]
    found = [Section("fxopt bench", tuple(facts), notes=tuple(record["notes"])), _latency(record)]
    for device, measured in record["devices"].items():
        if "not_measured" not in measured:
            found += [_throughput(device, measured), *_profile(device, measured)]
    found += [_memory(record), _cold(record)]
    return [section for section in found if section.facts or section.table or section.notes]


def _latency(record: Mapping[str, Any]) -> Section:
    rows, notes = [], []
    for device, measured in record["devices"].items():
        if "not_measured" in measured:
            rows.append((device, "-", f"not measured: {measured['not_measured']}", "", "", "", ""))
            continue
        found = measured["latency"]
        interval = f"[{words.duration(found['low_ms'])}, {words.duration(found['high_ms'])}]"
        tails = [words.duration(value) if value is not None else "-" for value in found["percentiles"].values()]
        calls, preempted = len(found["times"]), found["preempted"]
        interrupted = "-" if preempted is None else words.effect(preempted)
        rows.append((device, words.duration(found["median_ms"]), interval, *tails, str(calls), interrupted))
        for name, value in found["percentiles"].items():
            if value is None:
                notes.append(
                    f"{device}: {name} needs {TAILS[name][1]} calls, {calls} fitted into the budget: raise --budget"
                )
        notes += [f"{device}: {note}" for note in found["notes"]]
    headings = ("device", "median", "95 % interval", "p90", "p99", "calls", "preempted")
    return Section("Latency", table=Table(headings, tuple(rows), (1, 3, 4, 5, 6)), notes=tuple(notes))


def _throughput(device: str, measured: Mapping[str, Any]) -> Section:
    rows = []
    for batch, found in measured["throughput"].items():
        if "not_measured" in found:
            rows.append((batch, "-", f"not measured: {found['not_measured']}", "", ""))
            continue
        interval = f"[{words.count(found['low'])}, {words.count(found['high'])}]"
        each = words.duration(found["median_ms"] / found["batch"])
        rows.append((batch, words.count(found["per_second"]), interval, words.duration(found["median_ms"]), each))
    headings = ("batch", "samples a second", "95 % interval", "a call", "a sample")
    return Section(f"Throughput, {device}", table=Table(headings, tuple(rows), (0, 1, 3, 4)))


def _profile(device: str, measured: Mapping[str, Any]) -> Iterator[Section]:
    found, roofline = measured["profile"], measured["roofline"]
    if "not_measured" in found:
        yield Section(f"Operators, {device}", notes=(f"not measured: {found['not_measured']}",))
        return
    ceilings = (
        f"{words.count(roofline['flops_per_second'])}FLOP/s in {roofline['dtype']}, "
        f"{words.size(roofline['bytes_per_second'])}/s of memory, as measured here"
    )
    facts = [("ceilings", ceilings)]
    outside = found["python"] / found["seconds"] if found["seconds"] else 0.0
    facts.append(
        ("outside", f"{words.effect(outside)} of the profiled call is outside of operators: Python and launching")
    )
    slowed = 1e3 * found["seconds"] / measured["latency"]["median_ms"] - 1
    longer = f"{words.effect(slowed)} longer" if slowed > 0 else "no longer"
    facts.append(("profiler", f"a call takes {longer} while the profiler looks on"))
    notes = list(found["notes"])
    if any((cost["roofline"] or 0) > 1 for cost in found["operators"]):
        notes.append("above 100 % of the roofline: what is read was still in a cache, which is faster than memory")
    yield Section(f"Operators, {device}", tuple(facts), _costs(found["operators"], "operator", "{name}"), tuple(notes))
    yield Section(f"Modules, {device}", table=_costs(found["modules"], "module without what is in it", "{name} {kind}"))


def _costs(costs: list[dict[str, Any]], heading: str, name: str) -> Table:
    rows = []
    for cost in costs[:_MOST_ROWS]:
        rows.append(
            (
                name.format(**cost | {"name": cost["name"] or "(root)"}),
                f"{cost['calls']:g}",
                words.duration(1e3 * cost["seconds"]),
                words.effect(cost["share"]),
                words.count(cost["flops"]),
                words.size(cost["bytes"]),
                "-" if cost["roofline"] is None else words.effect(cost["roofline"]),
            )
        )
    if len(costs) > _MOST_ROWS:
        rows.append((f"and {len(costs) - _MOST_ROWS} more in the JSON record", "", "", "", "", "", ""))
    headings = (heading, "calls", "time", "share", "FLOPs", "bytes", "of the roofline")
    return Table(headings, tuple(rows), (1, 2, 3, 4, 5, 6))


def _memory(record: Mapping[str, Any]) -> Section:
    facts = []
    for device, measured in record["devices"].items():
        if "not_measured" in measured:
            continue
        size, profile = measured["size"], measured["profile"]
        facts.append(("weights", f"{words.size(size['bytes'])} in {words.count(size['parameters'])} parameters"))
        facts.append((f"a call, {device}", f"{words.size(size['peak_memory'])} of tensors at the peak"))
        if "not_measured" not in profile:
            facts.append(("", f"{words.size(profile['allocated'])} from torch's allocator, scratch space included"))
        if measured["reserved"] is not None:
            facts.append(("", f"{words.size(measured['reserved'])} reserved on the GPU"))
    cold = record["cold_start"]
    if cold.get("resident") is not None:
        facts.append(("process", f"{words.size(cold['resident'])} resident before the first call"))
        facts.append(("", f"{words.size(cold['resident_peak'])} at the peak of it"))
    return Section("Memory", tuple(dict.fromkeys(facts)))


def _cold(record: Mapping[str, Any]) -> Section:
    cold = record["cold_start"]
    if "not_measured" in cold:
        return Section("Cold start", notes=(f"not measured: {cold['not_measured']}",))
    stages = {"Python, torch and fxopt": "imports", "the model and its inputs": "load"}
    stages |= {"first call": "first_call", "second call": "second_call"}
    facts = [(name, words.duration(1e3 * cold[key])) for name, key in stages.items()]
    return Section("Cold start", tuple(facts))
