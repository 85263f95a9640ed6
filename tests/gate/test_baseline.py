from __future__ import annotations

import functools
import json
import subprocess
import sys

import jsonschema
import pytest

from fxopt.errors import BaselineError, GateError
from fxopt.gate import baseline
from fxopt.gate.baseline import BranchStore, FileStore
from fxopt.record import schema
from tests.gate.conftest import MODEL, Repo

MACHINE = {"cpu": "X", "cores": 2, "torch": "2.13", "threads": 1, "fxopt": "0.1"}


def entry(median: float = 1.0, spread: float = 0.01, machine: dict[str, object] = MACHINE, **facts: object):
    found = {"version": 1, "target": "model.py", "inputs": "1 float32", "device": "cpu", "commit": "a" * 40}
    found |= {"time": "2026-01-01T00:00:00+00:00", "machine": machine, "median_ms": median}
    return found | {"low_ms": median * (1 - spread), "high_ms": median * (1 + spread)} | facts


@pytest.mark.parametrize(
    ("then", "now", "verdict"),
    [
        (entry(1.0), entry(1.2), "REGRESSION"),
        (entry(1.0), entry(1.2, 0.3), "INCONCLUSIVE"),
        (entry(1.0), entry(1.01), "OK"),
        (entry(1.0), entry(0.8), "FASTER"),
        (entry(1.0), entry(1.09), "INCONCLUSIVE"),
    ],
)
def test_verdicts_without_pairs(then, now, verdict):
    assert baseline.judge_stored(then, now, 0.1) == verdict


def test_only_equal_machines_are_compared():
    other = MACHINE | {"cpu": "Y"}
    history = [entry(1.0), entry(2.0, machine=other)]
    assert baseline.last_comparable(history, entry(1.0, machine=MACHINE | {"fxopt": "0.2"})) is history[0]
    with pytest.raises(BaselineError, match="cpu: Y then, X now") as caught:
        baseline.last_comparable(history[1:], entry(1.0))
    assert caught.value.exit_code == 5
    with pytest.raises(BaselineError, match="inputs: 2 float32 then"):
        baseline.last_comparable([entry(inputs="2 float32")], entry())
    with pytest.raises(BaselineError, match="has no baseline"):
        baseline.last_comparable([], entry())


def test_the_band_is_that_of_most_entries():
    low, high = baseline.noise_band([entry(one) for one in (1.0, 1.01, 0.99, 1.0, 1.02, 5.0)])
    assert 0.9 < low < 0.99 and 1.02 < high < 1.1
    low, high = baseline.noise_band([entry(one) for one in (1.0, 1.0, 2.0, 2.0)])
    assert low * high == pytest.approx(2.0), "of as many below as above it lies around the middle of both"
    assert baseline.noise_band([entry(), entry()]) is None


def test_a_branch_keeps_lines_without_touching_tree_or_index(repo: Repo):
    repo.write(model="staged")
    repo.git("add", "--all")
    repo.write(model="not staged")
    before = repo.git("status", "--porcelain"), repo.git("rev-parse", "HEAD")
    repo.git("config", "user.name", "a")
    repo.git("config", "user.email", "a@example.com")
    store = BranchStore(repo.path, "perf")
    for number in range(3):
        store.append(json.dumps(entry(number + 1.0)))
    assert [one["median_ms"] for one in baseline.entries(store, "model.py", "cpu")] == [1.0, 2.0, 3.0]
    assert (repo.git("status", "--porcelain"), repo.git("rev-parse", "HEAD")) == before
    assert repo.git("rev-list", "--count", "perf") == "3"


def test_a_branch_that_is_checked_out_is_left_alone(repo: Repo):
    before = repo.git("rev-parse", "HEAD")
    with pytest.raises(GateError, match="the branch 'main' is checked out"):
        BranchStore(repo.path, "main").append(json.dumps(entry()))
    assert repo.git("rev-parse", "HEAD") == before


def test_a_line_that_is_no_entry_is_named(tmp_path):
    store = FileStore(tmp_path / "b.jsonl")
    store.append(json.dumps(entry()))
    store.append('{"version": 7}')
    with pytest.raises(GateError, match="line 2 of the baselines"):
        baseline.entries(store, "model.py", "cpu")


def test_a_clone_reads_the_branch_of_its_remote_and_goes_on_from_there(repo: Repo, make_repo):
    clone = make_repo("clone")
    for one in (repo, clone):
        one.git("config", "user.name", "a")
        one.git("config", "user.email", "a@example.com")
    BranchStore(repo.path, "perf").append(json.dumps(entry(1.0)))
    clone.git("remote", "add", "origin", str(repo.path))
    clone.git("fetch", "--quiet", "origin")
    store = BranchStore(clone.path, "perf")
    for known in ([1.0], [1.0, 2.0]):
        assert [one["median_ms"] for one in baseline.entries(store, "model.py", "cpu")] == known
        store.append(json.dumps(entry(2.0)))
    assert clone.git("rev-list", "--count", "perf") == "3"


def call(repo: Repo, *arguments: str, below: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fxopt", "baseline", *arguments]
    return subprocess.run(command, cwd=repo.path / below, env=repo.environment, capture_output=True, text=True)


def test_what_save_wrote_in_a_subfolder_is_no_change(repo: Repo):
    (repo.path / "sub").mkdir()
    repo.commit(**{"sub/model": MODEL})
    for _ in range(2):
        done = call(repo, "save", "model.py", "--budget", "0.3", "--quiet", below="sub")
        assert done.returncode == 0, done.stderr


def test_metrics_are_those_of_a_run_without_gradients(repo: Repo):
    evaluate = "def evaluate(module): return {'mean': module(example_inputs).numpy().mean()}"
    repo.commit(model=f"{MODEL}\n{evaluate}\n")
    done = call(repo, "save", "model.py", "--budget", "0.3", "--quiet")
    assert done.returncode == 0, done.stderr


def test_save_compare_and_history(repo: Repo):
    run = functools.partial(call, repo)
    quick = ("model.py", "--budget", "0.3s", "--quiet")
    done = run("compare", *quick)
    assert done.returncode == 5 and "`fxopt baseline save` makes one" in done.stderr
    done = run("save", *quick)
    assert done.returncode == 0 and done.stdout.startswith("kept "), done.stderr
    path = repo.path / "fxopt-baselines.jsonl"
    (line,) = path.read_text().splitlines()
    kept = json.loads(line)
    slower = kept | {key: kept[key] / 100 for key in ("median_ms", "low_ms", "high_ms")}
    path.write_text("".join(json.dumps(one) + "\n" for one in (kept | {"machine": {}}, kept, slower)))
    done = run("compare", *quick)
    assert done.returncode == 3 and "REGRESSION" in done.stdout and "fxopt ci" in done.stdout
    shown = run("compare", *quick, "--format", "json")
    jsonschema.validate(json.loads(shown.stdout), schema("baseline"), cls=jsonschema.Draft202012Validator)
    done = run("history", "model.py")
    assert done.returncode == 0 and "another machine" in done.stdout and "-99.0 %" in done.stdout
    done = run("history", "model.py", "--branch", "baselnes")
    assert done.returncode == 5 and "has no baseline on cpu on the branch 'baselnes'" in done.stderr
    path.unlink()
    for _ in range(2):
        done = run("save", *quick, "--file", "new/folder.jsonl")
        assert done.returncode == 0, "what it writes itself is no change"
    repo.write(other="changed")
    done = run("save", *quick, "--file", "new/folder.jsonl")
    assert done.returncode == 2 and "uncommitted changes ('other.py')" in done.stderr
