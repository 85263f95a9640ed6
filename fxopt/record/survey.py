"""The record of `fxopt bench`, as plain JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from fxopt.bench.survey import DeviceSurvey, Survey
from fxopt.record.plain import plain
from fxopt.record.version import SCHEMA


def of_survey(survey: Survey) -> dict[str, Any]:
    """Everything that was measured of one target: `kind` is "bench"; what was not measured says why.

    Keys are the fields of `fxopt.bench.survey`; times are in the unit that the name ends in, else in seconds.
    """
    return {
        "schema": SCHEMA,
        "kind": "bench",
        "target": survey.target,
        "inputs": survey.inputs,
        "machine": plain(asdict(survey.machine)),
        "devices": {name: _device(found) for name, found in survey.devices.items()},
        "cold_start": _or_reason(survey.cold),
        "notes": list(survey.notes),
    }


def _device(found: DeviceSurvey | str) -> dict[str, Any]:
    if isinstance(found, str):
        return {"not_measured": found}
    latency = asdict(found.latency) | {"times": [round(time, 9) for time in found.latency.times]}
    return {
        "latency": plain(latency),
        "throughput": {str(batch): _or_reason(one) for batch, one in found.throughput.items()},
        "size": plain(asdict(found.size)),
        "reserved": found.reserved,
        "roofline": plain(asdict(found.roofline)),
        "profile": _or_reason(found.profile),
    }


def _or_reason(found: Any) -> dict[str, Any]:
    if isinstance(found, str):
        return {"not_measured": found}
    written: dict[str, Any] = plain(asdict(found))
    return written
