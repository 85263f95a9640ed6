from __future__ import annotations

import copy
import dataclasses
import enum
import json
import math
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn

from fxopt.bench import Verdict, compare, fingerprint, measure_size
from fxopt.bench.comparison import BeforeAfter
from fxopt.errors import ArtifactError
from fxopt.inputs import Inputs
from fxopt.ledger import Ledger
from fxopt.record import SCHEMA, build, check_version, number, of_comparison, of_entry, plain, schema
from tests.report.ci_example import example as ci_example
from tests.report.record_example import captured, comparison, entry, example, ladder


def assert_valid(record: Any) -> None:
    jsonschema.validate(record, schema(), cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("kind", ["run", "bench", "ci", "baseline"])
def test_the_schemas_are_some(kind: str) -> None:
    jsonschema.Draft202012Validator.check_schema(schema(kind))
    # What they say of a machine is the same.
    assert schema(kind)["$defs"]["machine"] == schema()["$defs"]["machine"]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["kind"], "bench"),
        (["head", "extra"], 1),
        (["targets", 0, "verdict"], "SLOW"),
        (["targets", 0, "latency", "times", "base", 0], 0),
        (["targets", 0, "checks", 0, "status"], "maybe"),
        (["targets", 0, "cause", "pass"], 1),
    ],
)
def test_wrong_records_of_a_gate_are_refused(path: list[Any], value: object) -> None:
    record: Any = ci_example()
    jsonschema.validate(record, schema("ci"), cls=jsonschema.Draft202012Validator)
    part = record
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(record, schema("ci"), cls=jsonschema.Draft202012Validator)


def test_a_full_record_is_valid_and_survives_json() -> None:
    record = example()
    assert_valid(record)
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_top_level_is_what_is_promised() -> None:
    keys = "schema target inputs machine capture passes verified uncompared latency memory metrics engines".split()
    assert list(example()) == keys == schema()["required"] == list(schema()["properties"])


def test_a_bare_record_is_valid() -> None:
    record = build(
        target="model.py",
        inputs=Inputs(),
        machine=fingerprint(),
        captured=captured(opaque=(), guards=(), constants=(), notes=()),
        ledger=Ledger(()),
        verified=False,
    )
    assert_valid(record)
    assert record["schema"] == SCHEMA
    assert record["latency"] == {}
    assert record["memory"] == record["metrics"] == {"before": None, "after": None}


def test_what_was_really_measured_is_valid() -> None:
    module, inputs = nn.Linear(4, 4), torch.zeros(1, 4)
    measured = compare(module, module, inputs, pairs=3, budget_seconds=0.01)
    record = build(
        target="model.py",
        inputs=Inputs.of(inputs),
        machine=fingerprint(),
        captured=captured(),
        ledger=Ledger(()),
        verified=True,
        latency={"cpu": measured},
        memory=BeforeAfter(measure_size(module, inputs), measure_size(module, inputs)),
    )
    assert_valid(json.loads(json.dumps(record, allow_nan=False)))


def test_a_bound_that_allows_any_error_is_written() -> None:
    engines = dataclasses.replace(ladder(), max_error=math.inf)
    record = build(
        target="model.py",
        inputs=Inputs(),
        machine=fingerprint(),
        captured=captured(),
        ledger=Ledger(()),
        verified=True,
        engines=engines,
    )
    assert_valid(json.loads(json.dumps(record, allow_nan=False)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["schema"], "2.0"),
        (["extra"], 1),
        (["capture", "coverage", "flops"], 1.2),
        (["passes", 0, "promise"], "maybe"),
        (["passes", 0, "relative_error"], "large"),
        (["latency", "cpu", "verdict"], "fast"),
        (["latency", "cpu", "ratio"], 0),
        (["latency", "cuda", "not_measured"], None),
        (["memory", "before", "bytes"], -1),
        (["metrics", "after", "accuracy"], None),
    ],
)
def test_wrong_records_are_refused(path: list[Any], value: object) -> None:
    record: Any = copy.deepcopy(example())
    part = record
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        assert_valid(record)


@pytest.mark.parametrize(
    ("value", "written"),
    [(0.5, 0.5), (1, 1.0), (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")],
)
def test_numbers_that_json_lacks(value: float, written: object) -> None:
    assert number(value) == written


def test_an_error_that_is_not_finite() -> None:
    assert of_entry(entry("fuse", relative_error=math.nan))["relative_error"] == "nan"
    assert of_entry(entry("fuse"))["relative_error"] is None


class Kind(enum.Enum):
    ROW = "row"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (Kind.ROW, "row"),
        ((1, math.nan), [1, "nan"]),
        ({"b", "a"}, ["a", "b"]),
        ({Path("x"): torch.int8}, {"x": "torch.int8"}),
        ([None, True, "text"], [None, True, "text"]),
    ],
)
def test_options_as_plain_values(value: object, written: object) -> None:
    assert plain(value) == written


def test_latency_keeps_its_raw_times() -> None:
    latency = of_comparison(comparison(Verdict.SLOWER, 1.25))
    assert latency["verdict"] == "slower"
    assert latency["times"]["after"] == [0.0064] * 3
    assert latency["first_call_ms"]["before"] == pytest.approx(12.3)


@pytest.mark.parametrize("version", ["2.0", "0.9", None])
def test_records_of_other_versions(version: str | None) -> None:
    record = {} if version is None else {"schema": version}
    with pytest.raises(ArtifactError, match=f"cannot read a record of schema '{version or 'none'}'"):
        check_version(record)
    check_version({"schema": "1.7"})
