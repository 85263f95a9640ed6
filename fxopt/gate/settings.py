"""What to hold against what, and how much worse it may be: `fxopt.toml`, or the command line."""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fxopt.errors import GateError
from fxopt.seconds import seconds

FILE = "fxopt.toml"
_SHAPES: tuple[tuple[str, type, str], ...] = (
    ("devices", list, '["cpu"]'),
    ("engines", list, '["onednn"]'),
    ("limits", dict, '{ latency = "5%" }'),
    ("inputs", list, '["1x3x224x224"]'),
    ("lower_is_better", list, '["distance"]'),
)
_ONE_OF_SEVERAL = {"device": "devices", "engine": "engines"}


@dataclass(frozen=True)
class Limits:
    """How much worse the head may be than the base; shares of the base, or absolute where that is said.

    Attributes:
        latency: growth of the latency.
        memory: growth of the peak memory of a call.
        size: growth of the bytes of parameters and buffers.
        coverage: absolute loss of any of the shares that the graph shows.
        metrics: absolute loss of what `evaluate` gives; growth where less is better.
        output_error: relative difference of the outputs with equal weights; None where outputs may change.
    """

    latency: float = 0.05
    memory: float = 0.1
    size: float = 0.1
    coverage: float = 0.01
    metrics: float = 0.01
    output_error: float | None = None


@dataclass(frozen=True)
class Job:
    """One target on one device, by one engine.

    Attributes:
        name: that reports and the lock file call it by.
        target: as `fxopt run` takes it, relative to where the command runs.
        inputs: as `--input` takes them.
        passes: a spec; "" measures the module as it is.
        engine: the name of what runs both sides after the passes; "" for torch.
        device: "cpu" or "cuda".
        threads: that torch runs on the CPU.
        weights: a file to load into the module first; that of the head for a base whose revision has none there.
        budget: seconds that measuring may take.
        timed: whether to measure the latency at all; the rest needs no quiet machine.
        limits: what it is held to.
        lower_is_better: metrics of `evaluate` with names that don't say so, as those with `loss` or `wer` in them do.
    """

    name: str
    target: str
    inputs: tuple[str, ...] = ()
    passes: str = ""
    engine: str = ""
    device: str = "cpu"
    threads: int = 1
    weights: str | None = None
    budget: float = 20.0
    timed: bool = True
    limits: Limits = dataclasses.field(default_factory=Limits)
    lower_is_better: tuple[str, ...] = ()


def limit(name: str, text: str | float, where: str) -> float:
    """What a limit is set to: `5%`, `5 %` or `0.05` -> 0.05; one on `metrics` is no share, but a number of any size.

    Raises:
        GateError: for anything else.
    """
    percent = False
    if isinstance(text, (int, float)) and not isinstance(text, bool):
        value = float(text)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e-?\d+)?)\s*(%?)\s*", str(text))
        if match is None:
            raise GateError(f"{where}: '{text}' is no share: expected one such as 5% or 0.05")
        percent = bool(match[2])
        value = float(match[1]) / (100 if percent else 1)
    if name == "metrics":
        if not 0 <= value < math.inf:
            raise GateError(f"{where}: {text} is out of range: expected a number from 0 on, such as 0.01")
        return value
    if value >= 1 and not percent:
        raise GateError(f"{where}: {text} means {100 * value:g} %; did you mean {value:g}%? Write it with the sign")
    if not 0 <= value < 10 or (name == "latency" and not value):
        raise GateError(f"{where}: {text} is out of range: expected a share between 0 and 1000 %, such as 5%")
    return value


def read_jobs(path: Path, given: Mapping[str, Any] = MappingProxyType({})) -> tuple[Job, ...]:
    """The jobs of a `fxopt.toml`: `[[target]]` tables, over what `[defaults]` says, with `[limits]` in either.

    Args:
        path: the file.
        given: fields of every job, whatever the file says.

    Raises:
        GateError: where the file is missing or says something that is not understood, with the key.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8-sig"))  # editors of Windows put a mark in front
    except OSError as error:
        above = next((found for found in path.absolute().parents[1:] if (found / path.name).is_file()), None)
        advice = f"there is one in '{above}': run it there" if above else "write one with a [[target]] table"
        raise GateError(f"there is no '{path}': name a target, or {advice}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise GateError(f"cannot read '{path}': {error}") from error
    _known(content, {"defaults", "target"}, f"{path.name}")
    tables = content.get("target", [])
    if not isinstance(tables, list) or not tables:
        raise GateError(f"'{path.name}' has no [[target]]: expected at least one, with target = \"model.py:Net\"")
    defaults = _shaped(content.get("defaults", {}), f"{path.name}, defaults")
    jobs: list[Job] = []
    for number, table in enumerate(tables, 1):
        where = f"{path.name}, [[target]] {number}"
        own = _shaped(table, where)
        merged = {**defaults, **own, "limits": {**defaults.get("limits", {}), **own.get("limits", {})}}
        merged |= _several(given)
        devices, engines = merged.pop("devices", None) or ["cpu"], merged.pop("engines", None) or [""]
        for device, engine in itertools.product(devices, engines):
            job = _job(merged | {"device": device, "engine": engine}, where)
            name = job.name + f" on {device}" * (len(devices) > 1) + f" by {engine}" * (len(engines) > 1)
            jobs.append(dataclasses.replace(job, name=name))
    names = [job.name for job in jobs]
    for name in names:
        if names.count(name) > 1:
            raise GateError(f"'{path.name}' has two targets named '{name}': give one a name = \"...\" of its own")
    return tuple(jobs)


def _several(table: Mapping[str, Any]) -> dict[str, Any]:
    """One device or engine as a list of one: what a target says of either replaces what the defaults say."""
    return {_ONE_OF_SEVERAL.get(key, key): [value] if key in _ONE_OF_SEVERAL else value for key, value in table.items()}


def _shaped(table: Any, where: str) -> dict[str, Any]:
    """A table whose parts have the shape to be put together with those of another one."""
    if not isinstance(table, dict):
        raise GateError(f'{where}: {table!r} is no table: expected one, with target = "model.py:Net" and the like')
    for key, kind, example in _SHAPES:
        if not isinstance(table.get(key, kind()), kind):
            raise GateError(f"{where}: {key} = {table[key]!r}: expected it such as {example}")
    for one, several in _ONE_OF_SEVERAL.items():
        if one in table and several in table:
            raise GateError(f"{where}: it has '{one}' and '{several}': expected one of them")
    return _several(table)


def _job(table: Mapping[str, Any], where: str) -> Job:
    fields = {field.name for field in dataclasses.fields(Job)}
    _known(table, fields, where)
    if not isinstance(table.get("target"), str):
        raise GateError(f'{where}: expected target = "model.py:Net"')
    expected: dict[str, tuple[type, ...]] = dict.fromkeys(("name", "passes", "device", "engine", "weights"), (str,))
    expected |= {"threads": (int,), "budget": (float, int, str), "timed": (bool,)}
    for key, types in expected.items():
        value = table.get(key)
        if key in table and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
            raise GateError(f"{where}: {key} = {value!r}: expected a {types[0].__name__}")
    if table.get("threads", 1) < 1:
        raise GateError(f"{where}: threads = {table['threads']}: expected 1 or more")
    try:
        budget = seconds(table.get("budget", Job.budget))
    except ValueError as error:
        raise GateError(f"{where}: budget = {error}") from error
    limits = table.get("limits", {})
    _known(limits, {field.name for field in dataclasses.fields(Limits)}, f"{where}, limits")
    read = Limits(**{key: limit(key, value, f"{where}, limits.{key}") for key, value in limits.items()})
    lists = {key: tuple(map(str, table.get(key, ()))) for key in ("inputs", "lower_is_better")}
    return Job(**{"name": table["target"], **table, **lists, "budget": budget, "limits": read})


def _known(table: Mapping[str, Any], fields: set[str], where: str) -> None:
    for key in table:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean '{close[0]}'?" if close else f"; there are {', '.join(sorted(fields))}"
            raise GateError(f"{where}: unknown key '{key}'{hint}")
