"""What is decided without running anything: verdicts over made-up times, settings, locks, checks."""

from __future__ import annotations

import numpy as np
import pytest

from fxopt.errors import GateError
from fxopt.gate import Limits, exit_code, limit, lock, read_jobs
from fxopt.gate.checks import all_checks
from fxopt.gate.verdict import GateVerdict, advice, is_suspicious, judge_windows, wants_another
from fxopt.gate.window import Round, Window


def window(ratio: float, noise: float, seed: int = 0, again: float = 1.0, pairs: int = 40, mhz: float = 0.0) -> Window:
    rng = np.random.default_rng(seed)
    rounds = []
    for _ in range(3):
        base, head, other = 0.005 * np.exp(noise * rng.standard_normal((3, pairs)))
        made = Round(base.tolist(), (head * ratio).tolist(), (other * again).tolist())
        if mhz:
            made.mhz = {"base": [1000.0] * pairs, "head": [mhz] * pairs, "again": [1000.0] * pairs}
        rounds.append(made)
    return Window(tuple(rounds), 1, 1.0, 0.9)


@pytest.mark.parametrize(
    ("windows", "verdict"),
    [
        ([window(1.0, 0.02)], GateVerdict.OK),
        ([window(1.03, 0.02)], GateVerdict.OK),
        ([window(0.8, 0.02), window(0.8, 0.02, 1)], GateVerdict.FASTER),
        ([window(0.8, 0.02)], GateVerdict.INCONCLUSIVE),
        ([window(0.8, 0.02), window(1.0, 0.02, 1), window(1.0, 0.02, 2)], GateVerdict.OK),
        ([window(1.1, 0.02), window(1.1, 0.02, 1)], GateVerdict.REGRESSION),
        ([window(1.1, 0.02)], GateVerdict.INCONCLUSIVE),
        ([window(1.1, 0.02), window(1.0, 0.02, 1)], GateVerdict.INCONCLUSIVE),
        ([window(1.1, 0.02), window(1.0, 0.02, 1), window(1.1, 0.02, 2)], GateVerdict.REGRESSION),
        ([window(1.0, 0.6)], GateVerdict.INCONCLUSIVE),
        ([window(1.1, 0.02, again=1.2)] * 2, GateVerdict.INCONCLUSIVE),
        ([window(1.1, 0.02, mhz=900.0)] * 2, GateVerdict.INCONCLUSIVE),
        ([window(1.1, 0.0, pairs=1)] * 1, GateVerdict.INCONCLUSIVE),
    ],
)
def test_verdicts(windows, verdict):
    assert judge_windows(windows, 0.05) is verdict
    settled = verdict is not GateVerdict.INCONCLUSIVE
    assert wants_another(windows, 0.05) == (not settled and len(windows) < 3)


def test_equal_sides_are_no_regression_and_a_slower_one_is_never_ok():
    seeds = range(60)
    equal = [is_suspicious(window(1.0, 0.1, seed), 0.05) for seed in seeds]
    assert sum(equal) <= 1
    slower = [judge_windows([window(1.1, 0.1, seed), window(1.1, 0.1, seed + 100)], 0.05) for seed in seeds]
    assert GateVerdict.OK not in slower and GateVerdict.FASTER not in slower
    assert sum(verdict is GateVerdict.REGRESSION for verdict in slower) > 50


def test_advice_names_what_stands_in_the_way():
    assert "differs from itself by up to" in advice(window(1.0, 0.6), 0.05, 1)[0]
    assert "about as large as the threshold" in advice(window(1.05, 0.01), 0.05, 1)[0]
    assert "different clocks" in advice(window(1.0, 0.01, mhz=900.0), 0.05, 1)[0]
    tired = [1.0] * 30 + [1.3] * 10
    notes = advice(Window((Round(tired, tired, tired),), 1, 1.0, 0.9), 0.05, 1)
    assert "the machine's speed changed meanwhile" in notes[-1]


@pytest.mark.parametrize(
    ("verdicts", "strict", "code"),
    [
        (["OK", "FASTER"], True, 0),
        (["OK", "INCONCLUSIVE"], False, 0),
        (["OK", "INCONCLUSIVE"], True, 4),
        (["INCONCLUSIVE", "REGRESSION", "not comparable"], True, 3),
        (["REGRESSION", "wrong call"], False, 2),
        (["REGRESSION", "failed"], False, 1),
        (["OK", "not comparable"], False, 5),
    ],
)
def test_exit_codes(verdicts, strict, code):
    assert exit_code({"targets": [{"verdict": verdict} for verdict in verdicts]}, strict) == code


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("latency", "5%", 0.05),
        ("latency", "2.5 %", 0.025),
        ("latency", "0.05", 0.05),
        ("latency", 0.1, 0.1),
        ("latency", "900%", 9.0),
        ("size", 0, 0.0),
        ("output_error", "0%", 0.0),
        ("metrics", "15", 15.0),
    ],
)
def test_limits_are_shares_but_for_metrics(name, text, value):
    assert limit(name, text, "--fail-over") == pytest.approx(value)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        *(("latency", text, "no share") for text in ("", "five", "-5%", "5%%", True)),
        *(("latency", text, "out of range") for text in ("0%", 0.0, "1000%")),
        ("latency", "5", "5 means 500 %; did you mean 5%?"),
        ("size", 50, "did you mean 50%?"),
        ("size", -0.1, "out of range"),
        ("metrics", float("inf"), "a number from 0 on"),
    ],
)
def test_what_is_no_limit(name, text, said):
    with pytest.raises(GateError, match="--fail-over") as caught:
        limit(name, text, "--fail-over")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no [[target]]"),
        ("[[target]]\nname = 'a'", "expected target ="),
        ("[[target]]\ntarget = 'm.py'\npases = 'fuse'", "did you mean 'passes'?"),
        ("[[target]]\ntarget = 'm.py'\nthreads = '2'", "threads = '2': expected a int"),
        ("[[target]]\ntarget = 'm.py'\nthreads = 0", "threads = 0: expected 1 or more"),
        ("[[target]]\ntarget = 'm.py'\nbudget = '20x'", "budget = '20x' is no time of at least 0.1 s; write 60s"),
        ("[[target]]\ntarget = 'm.py'\nbudget = 0", "budget = 0 is no time of at least 0.1 s"),
        ("[[target]]\ntarget = 'm.py'\nbudget = [20]", "budget = [20]: expected a float"),
        ("[[target]]\ntarget = 'm.py'\nlimits = {latncy = '5%'}", "did you mean 'latency'?"),
        ("[[target]]\ntarget = 'm.py'\nlimits = {latency = 'x'}", "limits.latency: 'x' is no share"),
        ("[[target]]\ntarget = 'm.py'\n[[target]]\ntarget = 'm.py'", "two targets named 'm.py'"),
        ("[[target]]\ntarget = 'm.py'\ndevices = 'cpu'", "[[target]] 1: devices = 'cpu': expected it such as"),
        ("[defaults]\nengines = 'onednn'\n[[target]]\ntarget = 'm.py'", "defaults: engines = 'onednn': expected"),
        ("[[target]]\ntarget = 'm.py'\nlimits = '5%'", "limits = '5%': expected it such as { latency = \"5%\" }"),
        ("[[target]]\ntarget = 'm.py'\ninputs = '1x8'", "inputs = '1x8': expected it such as [\"1x3x224x224\"]"),
        ("[[target]]\ntarget = 'm.py'\ndevice = 'cpu'\ndevices = ['cuda']", "it has 'device' and 'devices'"),
        ("target = ['m.py']", "[[target]] 1: 'm.py' is no table"),
        ("[[target]\n", "cannot read"),
        ("[targets]\n", "did you mean 'target'?"),
    ],
)
def test_configurations_that_are_not_understood(tmp_path, text, said):
    path = tmp_path / "fxopt.toml"
    path.write_text(text)
    with pytest.raises(GateError) as caught:
        read_jobs(path)
    assert said in str(caught.value)


@pytest.mark.parametrize(("written", "meant"), [("20", 20.0), ("0.5", 0.5), ("'20s'", 20.0), ("'1.5 m'", 90.0)])
def test_a_budget_is_written_as_on_the_command_line(tmp_path, written, meant):
    path = tmp_path / "fxopt.toml"
    path.write_text(f"[[target]]\ntarget = 'm.py'\nbudget = {written}\n")
    (job,) = read_jobs(path)
    assert job.budget == meant


def test_a_target_on_several_devices_is_several_jobs(tmp_path):
    path = tmp_path / "fxopt.toml"
    path.write_text("[[target]]\ntarget = 'm.py'\ndevices = ['cpu', 'cuda']\n")
    assert [(job.name, job.device) for job in read_jobs(path)] == [("m.py on cpu", "cpu"), ("m.py on cuda", "cuda")]


def test_a_target_by_several_engines_is_several_jobs(tmp_path):
    path = tmp_path / "fxopt.toml"
    path.write_text("[[target]]\ntarget = 'm.py'\nengines = ['onednn', 'openvino']\n")
    assert [(job.name, job.engine) for job in read_jobs(path)] == [
        ("m.py by onednn", "onednn"),
        ("m.py by openvino", "openvino"),
    ]


def test_what_a_target_says_goes_over_the_defaults_whether_it_is_one_or_several(tmp_path):
    path = tmp_path / "fxopt.toml"
    path.write_text(
        "[defaults]\ndevices = ['cpu', 'cuda']\nengine = 'onednn'\n"
        "[[target]]\ntarget = 'm.py'\ndevice = 'cpu'\nengines = ['sparse']\n"
    )
    assert [(job.name, job.device, job.engine) for job in read_jobs(path)] == [("m.py", "cpu", "sparse")]


def test_a_file_with_the_mark_that_editors_of_windows_write(tmp_path):
    path = tmp_path / "fxopt.toml"
    path.write_text("[[target]]\r\ntarget = 'm.py'\r\n", encoding="utf-8-sig")
    assert [job.target for job in read_jobs(path)] == ["m.py"]


def test_a_file_that_lies_further_up_is_named(tmp_path):
    (tmp_path / "fxopt.toml").write_text("[[target]]\ntarget = 'm.py'\n")
    with pytest.raises(GateError, match=rf"there is one in '{tmp_path}': run it there"):
        read_jobs(tmp_path / "models" / "small" / "fxopt.toml")


def test_what_is_given_by_hand_goes_over_the_file(tmp_path):
    path = tmp_path / "fxopt.toml"
    path.write_text(
        "[[target]]\ntarget = 'm.py'\nthreads = 2\npasses = 'fuse'\nlower_is_better = ['distance']\n"
        "devices = ['cpu', 'cuda']\n"
    )
    (job,) = read_jobs(path, {"device": "cpu", "timed": False, "threads": 1})
    assert (job.name, job.device, job.timed, job.threads, job.passes) == ("m.py", "cpu", False, 1, "fuse")
    assert job.lower_is_better == ("distance",)


def changed(*whats: str):
    return [{"name": "fuse", "changes": [{"what": what} for what in whats]}]


def test_matches_are_counted_by_kind_and_losses_named(tmp_path):
    then = lock.count(changed("folded into 'a'", "folded into 'b'", "joined relu"))
    assert then == {"fuse": {"folded into '...'": 2, "joined relu": 1}}
    assert lock.count(changed("joined relu") + changed("joined relu")) == {"fuse": {"joined relu": 2}}
    assert lock.lost(then, lock.count(changed("folded into 'c'", "joined relu", "new"))) == [
        "fuse: folded into '...': 1 instead of 2"
    ]
    path = tmp_path / lock.FILE
    assert lock.read(path) is None
    path.write_text(lock.updated(path, {"b": then}))
    path.write_text(lock.updated(path, {"a": then}))
    assert lock.read(path) == {"a": then, "b": then}
    assert '"modèle"' in lock.updated(path, {"modèle": then})
    path.write_text("<<<<<<< HEAD\n")
    path.write_text(lock.updated(path, {"a": then}))
    assert lock.read(path) == {"a": then}
    path.write_text("{}")
    with pytest.raises(GateError, match="no lock file of this fxopt"):
        lock.read(path)


def facts(**changes):
    size = {"peak_memory": 100_000, "bytes": 100_000}
    coverage = {"call_sites": 1.0, "flops": 0.9, "parameters": 1.0}
    found = {"metrics": {"accuracy": 0.9, "loss": 1.0}, "size": size, "coverage": coverage, "passes": changed("folded")}
    return found | {"output_error": 0.01} | changes


@pytest.mark.parametrize(
    ("name", "falls"),
    [
        *((name, True) for name in ("loss", "val_loss", "Top1 Error", "rmse", "test/wer", "ppl", "fid", "distance")),
        *((name, False) for name in ("accuracy", "gloss_accuracy", "f1", "terror_recall")),
    ],
)
def test_the_better_direction_of_a_metric_is_that_of_the_words_in_its_name(name, falls):
    then, now = facts(metrics={name: 1.0}), facts(metrics={name: 2.0})
    check = all_checks(then, now, Limits(), None, ["distance"])[0]
    assert (check.name, check.status) == (name, "failed" if falls else "ok")


@pytest.mark.parametrize(
    ("head", "failed"),
    [
        ({}, []),
        ({"metrics": {"accuracy": 0.88, "loss": 0.5}}, ["accuracy"]),
        ({"metrics": {"accuracy": 0.95, "loss": 1.02}}, ["loss"]),
        ({"metrics": {"accuracy": "nan", "loss": 1.0}}, ["accuracy"]),
        ({"metrics": None}, ["accuracy", "loss"]),
        ({"size": {"peak_memory": 120_000, "bytes": 100_000}}, ["peak memory"]),
        ({"size": {"peak_memory": None, "bytes": 120_000}}, ["size"]),
        ({"coverage": {"call_sites": 1.0, "flops": 0.8, "parameters": 1.0}}, ["coverage, flops"]),
        ({"output_error": 0.5}, ["output error"]),
        ({"output_error": "parameters have other names"}, ["output error"]),
        ({"output_error": float("nan")}, ["output error"]),
        ({"passes": changed()}, ["matches"]),
    ],
)
def test_limits(head, failed):
    checks = all_checks(facts(), facts(**head), Limits(output_error=0.1), lock.count(changed("folded")))
    assert [check.name for check in checks if check.status == "failed"] == failed
    assert all(check.message for check in checks if check.status != "ok")
