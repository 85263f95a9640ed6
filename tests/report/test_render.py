from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from fxopt.bench import BeforeAfter, Clocks, Verdict
from fxopt.errors import ArtifactError, SpecError
from fxopt.inputs import Inputs
from fxopt.ledger import Ledger
from fxopt.record import Record, build, of_comparison
from fxopt.report import groups, render, words
from tests.report.record_example import MACHINE, captured, comparison, example

GOLDENS = Path(__file__).parent.parent / "goldens"


@pytest.mark.parametrize(("format", "ending"), [("table", "txt"), ("markdown", "md"), ("json", "json")])
def test_golden(format: str, ending: str) -> None:
    golden = GOLDENS / f"report.{ending}"
    text = render(example(), format)
    if "FXOPT_WRITE_GOLDENS" in os.environ:
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8")


def test_the_terminal_is_narrow_and_plain() -> None:
    record = copy.deepcopy(example())
    record["capture"]["opaque"] *= 30
    record["passes"][1]["skips"] = [
        {"where": f"block{index}.norm", "reason": f"reason {index} " * 12, "source": ""} for index in range(30)
    ]
    text = render(record)
    assert max(map(len, text.splitlines())) <= 100
    assert text.isascii() and "\033" not in text
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert "and 18 more, all in the JSON record" in text
    assert "and 22 more, all in the JSON record" in text


def bare(**facts: Any) -> Record:
    nothing = captured(opaque=(), guards=(), constants=(), notes=())
    return build(
        target="model.py",
        inputs=Inputs(),
        machine=MACHINE,
        captured=nothing,
        ledger=Ledger(()),
        verified=False,
        **facts,
    )


@pytest.mark.parametrize("format", ["table", "markdown"])
def test_a_bare_record_says_what_it_can(format: str) -> None:
    text = render(bare(), format)
    assert "NO: outputs were not compared" in text
    for absent in ("Latency", "Passes", "Changes", "Left alone", "Before and after"):
        assert absent not in text


def test_a_handful_of_pairs_has_no_interval() -> None:
    text = render(bare(latency={"cpu": comparison(pairs=2)}))
    assert "x [too few pairs]" in text


def test_the_clocks_of_a_gpu_are_shown() -> None:
    clocks = BeforeAfter(Clocks(1980.0), Clocks(1965.0))
    text = render(bare(latency={"cuda": comparison(clocks=clocks)}))
    assert re.search(r"clock in MHz, cuda +1,980 +1,965", text)


def test_the_reason_for_no_latency_is_shown() -> None:
    assert "not measured: no CUDA device" in render(bare(latency={"cuda": "no CUDA device"}))


def test_markdown_tables_keep_their_columns() -> None:
    record = bare(latency={"a|b": comparison()})
    rows = [line.replace("\\|", "") for line in render(record, "markdown").splitlines() if line.startswith("|")]
    for row in rows[:3]:
        assert row.count("|") == 8, row


def test_json_is_the_record() -> None:
    assert json.loads(render(example(), "json")) == example()


def test_unknown_format() -> None:
    with pytest.raises(SpecError, match="unknown format 'html'; there are table, markdown, json"):
        render(example(), "html")


def test_other_versions_are_refused() -> None:
    record = example()
    record["schema"] = "2.0"
    with pytest.raises(ArtifactError, match=r"schema '2\.0'"):
        render(record)


@pytest.mark.parametrize(
    ("verdict", "ratio", "text"),
    [
        (Verdict.FASTER, 0.5, "2.00x faster [1.96, 2.04]"),
        (Verdict.SLOWER, 1.25, "1.25x slower [1.23, 1.27]"),
        (Verdict.EQUIVALENT, 1.0, "1.00x [0.98, 1.02]"),
        (Verdict.INCONCLUSIVE, 0.8, "1.25x [1.23, 1.28]"),
    ],
)
def test_no_effect_without_its_interval(verdict: Verdict, ratio: float, text: str) -> None:
    assert words.speedup(of_comparison(comparison(verdict, ratio))) == text


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (words.duration(0.0871), "87.1 us"),
        (words.duration(4.211), "4.21 ms"),
        (words.duration(999.96), "1000 ms"),
        (words.duration(61_000), "61.0 s"),
        (words.count(9408), "9,408"),
        (words.count(11_689_512), "11.7 M"),
        (words.count(None), "-"),
        (words.size(512), "512 B"),
        (words.size(46_827_520), "44.7 MiB"),
        (words.share(1.0), "100 %"),
        (words.share(0.99999), "99.9 %"),
        (words.share(0.00001), "0.1 %"),
        (words.share(0.0), "0 %"),
        (words.effect("inf"), "inf"),
        (words.error(0.0), "0"),
        (words.error("nan"), "nan"),
        (words.error(None), "-"),
        (words.decibels(42), "42.0 dB"),
        (words.decibels("inf"), "no loss"),
        (words.decibels("-inf"), "-inf dB"),
        (words.decibels("nan"), "nan dB"),
        (words.relative(200, 150), "-25.0 %"),
        (words.relative(0, 10), ""),
        (words.relative(10, 10), "same"),
        (words.difference(0.97, "nan"), ""),
        (words.difference(0.97, 0.98), "+0.01"),
    ],
)
def test_words(written: str, text: str) -> None:
    assert written == text


def test_groups_name_what_all_share() -> None:
    kinds = groups.changes(example()["passes"][0])
    assert [group.text for group in kinds] == ["folded into '...'", "joined relu to 'stem'"]
    assert [len(group.places) for group in kinds] == [20, 1]
    assert kinds[1].shortened(3) == "joined relu to 'stem': stem.relu (model.py:31)"


def test_what_is_said_of_the_model_as_a_whole_has_no_place() -> None:
    assert groups.Group("2 Conv on integers", ("",)).shortened(3) == "2 Conv on integers"
    assert groups.Group("in floats", ("", "fc", "head")).shortened(2) == "3x in floats: the model, fc and 1 more"
