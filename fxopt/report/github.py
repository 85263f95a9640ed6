"""A gate as workflow commands, which GitHub shows as annotations on the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fxopt.report.ci import failures, in_repository, verdict_row

_LEVELS = {"INCONCLUSIVE": "warning", "new": "notice", "not comparable": "warning", "OK": "notice", "FASTER": "notice"}


def github(record: Mapping[str, Any]) -> str:
    """`::error file=model.py,title=fxopt ci::message`, one line for each thing that is wrong, else one a target."""
    lines = []
    for target in record["targets"]:
        level = _LEVELS.get(target["verdict"], "error")
        place = target["target"].partition(":")[0]
        where = f"file={_value(in_repository(record, place))}," if place.endswith(".py") else ""
        title = _value(f"fxopt ci: {target['name']}: {target['verdict']}")
        told = verdict_row(target)[2:5] if target["latency"] else ()
        for message in failures(target) or [" ".join([*told, *target["notes"]]) or "not measured"]:
            lines.append(f"::{level} {where}title={title}::{_data(message)}")
    return "".join(f"{line}\n" for line in lines)


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _value(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
