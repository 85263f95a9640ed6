"""`fxopt ci` by real processes in real repositories: verdicts, causes, exit codes, and what it leaves behind."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import site
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from fxopt.errors import BaselineError, GateError
from fxopt.gate import Job, Plan, contest, processes, run_gate
from fxopt.gate.contest import Contest
from fxopt.gate.processes import Launcher
from fxopt.gate.revision import Repository
from tests.gate.conftest import MODEL, QUICK, ROOT, SLOWER, Repo


def test_a_slower_model_is_a_regression_with_its_cause_in_every_report(repo: Repo, tmp_path):
    repo.write(model=SLOWER)
    summary, junit = tmp_path / "summary.md", tmp_path / "junit.xml"
    workflow = {"GITHUB_ACTIONS": "true", "GITHUB_STEP_SUMMARY": str(summary)}
    kept = tmp_path / "record.json"
    files = ("--junit", str(junit), "--json", str(kept))
    done = repo.ci("model.py", "--passes", "fuse", *files, *QUICK, **workflow)
    assert done.returncode == 3, done.stderr
    assert "::error file=model.py," in done.stdout
    record = json.loads(kept.read_text())
    (target,) = record["targets"]
    assert target["verdict"] == target["latency"]["verdict"] == "REGRESSION"
    assert target["latency"]["ratio"] > 1.5 and target["latency"]["low"] > 1
    assert target["latency"]["windows"] >= 2
    assert target["cause"]["pass"] is None and "model.py" in target["cause"]["what"]
    assert [rung["after"] for rung in target["cause"]["ladder"]] == ["the model itself"]
    assert record["head"]["dirty"] is True and "model.py" in record["head"]["uncommitted"]
    assert "REGRESSION" in summary.read_text() and "caused by the model itself" in summary.read_text()
    failure = ElementTree.parse(junit).getroot().find(".//testcase[@name='latency']/failure")
    assert "caused by" in failure.get("message")
    assert repo.left_behind() == []


def test_a_regression_stays_one_where_its_cause_is_not_found(repo: Repo, monkeypatch):
    def too_slow(*arguments: object) -> None:
        raise GateError("the model is too slow for the budget")

    monkeypatch.setattr(contest, "find_cause", too_slow)
    repo.write(model=SLOWER)
    target = repo.only(code=3)
    assert target["latency"]["ratio"] > 1.5 and target["cause"] is None
    assert target["notes"] == ["the cause was not found: the model is too slow for the budget"]


def test_a_limit_that_is_exceeded_is_a_regression_though_the_latency_is_not_measured(repo: Repo, monkeypatch):
    def too_slow(*arguments: object, **options: object) -> None:
        raise GateError("the model is too slow for the budget")

    monkeypatch.setattr(contest, "take_window", too_slow)
    repo.write(model=MODEL + "\nmodel.extra = nn.Linear(500, 500)\n")
    target = repo.only(code=3)
    assert [check["name"] for check in target["checks"] if check["status"] == "failed"] == ["size"]
    assert target["notes"] == ["the model is too slow for the budget"]
    assert target["latency"] is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no file that is always full")
def test_a_report_is_printed_though_a_file_cannot_be_written(repo: Repo):
    repo.write(model=MODEL + "\nmodel.extra = nn.Linear(500, 500)\n")
    (repo.path / "history").write_text("\n")
    files = ("--json", "/dev/full", "--html", "page.html", "--history", "history")
    done = repo.ci("model.py", "--no-latency", *files, *QUICK)
    assert done.returncode == 3 and "REGRESSION" in done.stdout
    assert "--json: cannot write '/dev/full'" in done.stderr and "Traceback" not in done.stderr
    assert "REGRESSION" in (repo.path / "page.html").read_text()


def test_equal_code_is_no_regression(repo: Repo):
    target = repo.only()
    assert target["verdict"] in ("OK", "FASTER", "INCONCLUSIVE")
    assert target["latency"]["measuring_seconds"] <= target["latency"]["seconds"]


SLEEPS = MODEL.replace("import torch\n", "import time\nimport torch\n", 1).replace(
    "return self.fc(", "time.sleep(0.005)\n        return self.fc("
)


@pytest.mark.parametrize(("engine", "slower"), [("", True), ("onednn", False)])
def test_both_sides_run_by_the_engine(repo: Repo, engine: str, slower: bool):
    """It runs the graph, in which no sleep is."""
    repo.write(model=SLEEPS)
    record = repo.gate(engine=engine)
    (target,) = record["targets"]
    assert target["engine"] == engine and (target["verdict"] == "REGRESSION") is slower
    assert (target["latency"]["ratio"] > 1.5) is slower


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("engine", ["", "cudnn", "cudagraph"])
def test_equal_code_is_no_regression_on_a_gpu(repo: Repo, engine: str):
    target = repo.only(device="cuda", engine=engine)
    assert target["verdict"] in ("OK", "FASTER", "INCONCLUSIVE")
    assert target["device"] == "cuda" and target["latency"]["base_ms"] > 0


def test_what_is_held_to_limits_is_what_the_engine_runs(repo: Repo):
    repo.write(model=MODEL + "\nmodel.fc.weight.data += 0.1\n")
    target = repo.only(engine="onednn", timed=False, output_error=1e-4)
    checks = {check["name"]: check for check in target["checks"]}
    assert checks["output error"]["status"] == "ok" and checks["peak memory"]["status"] == "not checked"


def test_an_engine_that_neither_side_can_have_is_a_wrong_call(repo: Repo):
    target = repo.only(engine="cudnn", timed=False, code=2)
    assert target["notes"][0].startswith("head: engine 'cudnn'")


def test_an_unknown_engine_is_a_wrong_call(repo: Repo):
    done = repo.ci("model.py", "--engine", "onednm", *QUICK)
    assert done.returncode == 2 and "unknown engine 'onednm'; did you mean 'onednn'?" in done.stderr


@pytest.mark.parametrize(("ignored", "loaded"), [("*.pt", (2.0, 2.0)), ("", (1.0, 2.0))])
def test_a_side_loads_its_own_weights_and_a_base_without_any_those_of_the_head(repo: Repo, ignored, loaded):
    def keep(value: float) -> None:
        torch.save({"weight": torch.full((1, 1), value)}, repo.path / "kept.pt")

    (repo.path / ".gitignore").write_text(ignored)
    keep(1.0)
    repo.commit(
        model="""
            import torch
            model = torch.nn.Linear(1, 1, bias=False)
            example_inputs = torch.ones(1, 1)
            def evaluate(module):
                return {"weight": module.weight.item()}
        """
    )
    keep(2.0)
    (check,) = (check for check in repo.only(weights="kept.pt", timed=False)["checks"] if check["name"] == "weight")
    assert (float(check["before"]), float(check["after"])) == loaded


@pytest.mark.parametrize(
    ("more", "engine", "forks"),
    [
        pytest.param("", "", True, id="once a side"),
        pytest.param("", "onednn", True, id="once a side, in whose process no engine is built"),
        pytest.param(
            "\nimport threading, time\nthreading.Thread(target=time.sleep, args=(1e5,), daemon=True).start()\n",
            "",
            False,
            id="once a process where a thread runs, which no fork would have",
        ),
    ],
)
def test_what_is_timed_is_a_fork_where_that_is_sound(repo: Repo, tmp_path, more, engine, forks):
    log = tmp_path / "loads"
    repo.commit(model=f"{MODEL}\nopen({str(log)!r}, 'a').write('x')\n{more}")
    latency = repo.only(passes="clean,fuse", engine=engine, latency=9.0)["latency"]
    assert latency["processes"] == 9 * latency["windows"]
    assert len(log.read_text()) == (2 if forks else 2 + 2 + latency["processes"])


def test_equal_code_passes_every_other_check(repo: Repo):
    target = repo.only(passes="clean,fuse", output_error=1e-3, timed=False)
    assert target["verdict"] == "OK" and target["latency"] is None
    checks = {check["name"]: check for check in target["checks"]}
    assert checks["output error"]["status"] == "ok" and checks["output error"]["after"] == "0"
    assert checks["size"]["status"] == checks["coverage, flops"]["status"] == "ok"
    for nodes in target["graphs"].values():
        assert {node["file"] for node in nodes} == {"", "model.py"}


@pytest.mark.parametrize("engine", ["", "onednn"])
def test_a_module_with_what_cannot_be_copied_is_compared(repo: Repo, engine):
    locked = MODEL + "\nimport threading\nmodel.lock = threading.Lock()\n"
    repo.commit(model=locked)
    repo.write(model=locked + "model.fc.weight.data += 0.1\n")
    target = repo.only(engine=engine, passes="clean", latency=9.0)
    checks = {check["name"]: check for check in target["checks"]}
    # Engines sum in an order of their own, by where memory lies; 0.1 in the weights would be far above that.
    assert float(checks["output error"]["after"]) < 1e-6 and target["latency"]["pairs"] > 0


def test_the_base_is_where_the_branch_left(repo: Repo):
    left = repo.git("rev-parse", "HEAD")
    repo.git("checkout", "--quiet", "-b", "mine")
    repo.commit(other="")
    repo.git("checkout", "--quiet", "main")
    repo.commit(model="raise ValueError('this came later')")
    repo.git("checkout", "--quiet", "mine")
    assert repo.gate(base="main", timed=False)["base"] == {"revision": "main", "commit": left}


def test_imports_of_the_base_come_from_the_base(repo: Repo):
    """Though the repository is on the path of imports, as an editable install would put it."""
    uses = "import torch\nfrom layers import Layer\nmodel = Layer()\nexample_inputs = torch.ones(2)\n"
    layer = (
        "import torch\nclass Layer(torch.nn.Module):\n    def forward(self, x):\n        return {'y': x * %s}['y']\n"
    )
    repo.commit(model=uses, layers=layer % 2)
    repo.write(layers=layer % 3)
    target = repo.only(output_error=0.1, code=3, timed=False)
    failed = [check for check in target["checks"] if check["status"] == "failed"]
    assert [(check["name"], check["after"]) for check in failed] == [("output error", "5.0e-01")]


@pytest.mark.parametrize("name", ["fxopt", "passes"])
def test_a_file_with_the_name_of_a_part_of_fxopt_is_not_taken_for_it(repo: Repo, name: str):
    repo.commit(**{name: "raise ValueError('it was imported')"})
    repo.patch.chdir(repo.path)
    with Launcher() as repo.launcher:
        assert repo.only(passes="fuse", timed=False)["verdict"] == "OK"


def test_a_model_that_asks_for_input_is_told_that_there_is_none(repo: Repo):
    repo.commit(model=f"input()\n{MODEL}")
    assert "EOFError" in repo.only(code=2)["notes"][0]


def test_a_base_that_would_run_the_code_of_the_head_is_refused(repo: Repo, tmp_path):
    repo.commit(
        layers="from torch.nn import Identity\n",
        model="import layers, torch\nmodel = layers.Identity()\nexample_inputs = torch.ones(2)\n",
    )
    finder = tmp_path / "finder"
    finder.mkdir()
    (finder / "sitecustomize.py").write_text(
        "import sys, importlib.util\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        return importlib.util.spec_from_file_location(name, {str(repo.path / 'layers.py')!r}) "
        "if name == 'layers' else None\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    path = os.pathsep.join([str(finder), repo.environment["PYTHONPATH"]])
    done = repo.ci("model.py", "--no-latency", *QUICK, PYTHONPATH=path)
    assert done.returncode == 5
    assert "the base imports 'layers' from the working tree" in " ".join(done.stdout.split())


def test_a_fusion_that_no_longer_fires_fails_by_the_lock(repo: Repo):
    done = repo.ci("model.py", "--passes", "fuse", "--update-lock", "--no-latency", *QUICK)
    assert done.returncode == 0, done.stderr
    assert json.loads((repo.path / "fxopt.lock").read_text())["targets"]["model.py"]["fuse"]
    repo.commit()
    repo.write(model=MODEL.replace("self.bn(self.conv(x))", "self.bn(torch.sigmoid(self.conv(x)))"))
    target = repo.only(passes="fuse", timed=False, code=3)
    (matches,) = [check for check in target["checks"] if check["name"] == "matches"]
    assert matches["status"] == "failed" and "instead of" in matches["message"]
    update = ("--update-lock", "--no-latency", "--max-memory-growth", "900%")
    for text in ((repo.path / "fxopt.lock").read_text(), "<<<<<<< HEAD\n"):
        (repo.path / "fxopt.lock").write_text(text)
        done = repo.ci("model.py", "--passes", "fuse", *update, *QUICK)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("data", ["[example_inputs]", "iter([example_inputs])"])
def test_outputs_with_equal_weights_are_those_of_a_calibrated_model(repo: Repo, data: str) -> None:
    repo.commit(model=f"{MODEL}\ncalibration_data = {data}\n")
    repo.write(model=f"{MODEL}\nmodel.fc.weight.data += 0.1\ncalibration_data = {data}\n")
    target = repo.only(passes="clean,fuse,ptq", timed=False)
    (check,) = [check for check in target["checks"] if check["name"] == "output error"]
    assert check["after"] == "0" and "no limit is set" in check["message"]


@pytest.mark.parametrize("passes", ["", "clean"])
def test_a_head_that_fails_with_the_weights_of_the_base_has_no_output_error(repo: Repo, passes: str) -> None:
    repo.commit(model=f"{MODEL}\nmodel.fc.weight.data.fill_(1.0)\n")
    picky = "assert self.fc.weight.sum() < 10, 'too large'\n        return self.fc("
    repo.write(model=MODEL.replace("return self.fc(", picky))
    target = repo.only(passes=passes, timed=False)
    (check,) = [check for check in target["checks"] if check["name"] == "output error"]
    assert check["after"] == "-"
    assert check["message"] == "the head fails with the weights of the base: AssertionError: too large"


@pytest.mark.parametrize(
    ("before", "after", "name"),
    [
        ("", "def evaluate(module): return {'accuracy': 0.9}", "accuracy"),
        ("def evaluate(module): return {'loss': 1.0}", "def evaluate(module): return {'loss': 1.5}", "loss"),
        ("", "model.extra = nn.Linear(500, 500)", "size"),
    ],
)
def test_what_else_is_held_to_a_limit(repo: Repo, before, after, name):
    repo.commit(model=f"{MODEL}\n{before or 'def evaluate(module): return dict(accuracy=0.95)'}")
    repo.write(
        model=f"{MODEL}\n{after}" if name != "size" else f"{repo.path.joinpath('model.py').read_text()}\n{after}"
    )
    target = repo.only(code=3, timed=False)
    assert [check["name"] for check in target["checks"] if check["status"] == "failed"] == [name]


def test_a_pass_that_breaks_its_promise_in_the_head_is_a_regression(repo: Repo):
    plugin(repo, "return x * 2")
    repo.commit()
    plugin(repo, "return x * 2", broken=True)
    target = repo.only(passes="double", code=3)
    assert "double" in target["notes"][0] and "differs from the original" in target["notes"][0]


def plugin(repo: Repo, forward: str, broken: bool = False, slow: str = "") -> None:
    """A pass of the repository's own: it swaps ReLU modules for its own, those named in `slow` for slow ones."""
    model = """
        import torch
        from torch import nn
        model = nn.Sequential(*(nn.ReLU() for _ in range(6)))
        example_inputs = torch.ones(200, 100)
        calibration_data = [example_inputs]
    """
    repo.write(
        model=model,
        double=f"""
            from dataclasses import dataclass
            import torch
            from torch import nn
            from fxopt.contract import Change, Promise, Rewrite

            class Own(nn.Module):
                def __init__(self, slow):
                    super().__init__()
                    self.slow = slow
                    self.ready = False
                def forward(self, x):
                    assert self.ready
                    for _ in range(500 if self.slow else 0):
                        x = x.clone()
                    return torch.relu(x) + {int(broken)}

            @dataclass(frozen=True)
            class Double(Rewrite):
                '''Swaps activations.'''
                name = "double"
                promise = Promise.CLOSE
                def match(self, node, region):
                    found = node.op == "call_module" and isinstance(region.submodule(node), nn.ReLU)
                    return node if found else None
                def rewrite(self, match, region):
                    where = region.qualified(match)
                    region.swap(match, Own(where == {slow!r}))
                    return Change("swapped", where)
                def finish(self, module, calibration):
                    for child in module.modules():
                        if isinstance(child, Own):
                            child.ready = bool(list(calibration))
                    return iter(())

            PASSES = (Double,)
        """,
    )
    info = repo.path / "double-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: double\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[fxopt.passes]\ndouble = double\n")


def test_the_pass_and_the_change_that_cause_it_are_named(repo: Repo):
    plugin(repo, "")
    repo.commit()
    plugin(repo, "", slow="4")
    target = repo.only(passes="clean,double", code=3)
    assert target["cause"]["pass"] == "double"
    assert target["cause"]["what"] == "'4' swapped"
    assert [rung["after"] for rung in target["cause"]["ladder"]] == ["the model itself", "clean", "double"]


def test_dependencies_that_differ_get_an_environment_of_their_own(repo: Repo):
    uses = (
        "import tiny_number, torch\n" + MODEL + "\ndef evaluate(module): return {'number': float(tiny_number.NUMBER)}\n"
    )
    for version in (1, 2):
        wheel(repo, version)
    (repo.path / "requirements.txt").write_text("./tiny_number-1-py3-none-any.whl\n")
    repo.commit(model=uses)
    (repo.path / "requirements.txt").write_text("./tiny_number-2-py3-none-any.whl\n")
    # What this environment has installed comes behind what the base installs for itself.
    finder = repo.path.parent / "finder"
    finder.mkdir()
    installed = str(repo.path / "tiny_number-2-py3-none-any.whl")
    (finder / "sitecustomize.py").write_text(f"import sys\nsys.path.append({installed!r})\n")
    path = os.pathsep.join([str(finder), repo.environment["PYTHONPATH"]])
    done = repo.ci("model.py", "--format", "json", "--no-latency", *QUICK, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr + done.stdout
    (target,) = json.loads(done.stdout)["targets"]
    (number,) = [check for check in target["checks"] if check["name"] == "number"]
    assert (number["before"], number["after"]) == ("1", "2")


@pytest.mark.parametrize("linked", [False, True], ids=["reached directly", "reached by a link"])
def test_an_environment_inside_of_the_repository_is_shared_with_that_of_the_base(repo: Repo, linked):
    uses = "import installed, layers, tiny_number, torch\n" + MODEL
    uses += "\ndef evaluate(module): return {'own': float(layers.NUMBER), 'number': float(tiny_number.NUMBER)}\n"
    for version in (1, 2):
        wheel(repo, version)
    (repo.path / "src").mkdir()
    (repo.path / ".gitignore").write_text(".venv\n")
    (repo.path / "requirements.txt").write_text("-r more.txt\n")
    (repo.path / "more.txt").write_text("./tiny_number-1-py3-none-any.whl\n")
    repo.commit(model=uses, **{"src/layers": "NUMBER = 1"})
    (repo.path / "more.txt").write_text("./tiny_number-2-py3-none-any.whl\n")
    repo.write(**{"src/layers": "NUMBER = 2"})
    place = repo.path
    if linked:
        place = repo.path.parent / "link"
        place.symlink_to(repo.path)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / ".venv"], check=True)
    (packages,) = place.glob(".venv/lib/*/site-packages")
    (packages / "installed.py").touch()
    paths = [*site.getsitepackages(), place / "src", place / "tiny_number-2-py3-none-any.whl"]
    (packages / "editable.pth").write_text("".join(f"{path}\n" for path in paths))
    command = [place / ".venv/bin/python", "-m", "fxopt", "ci", "model.py", "--no-latency", "--format", "json", *QUICK]
    done = subprocess.run(command, cwd=place, env=repo.environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    (target,) = json.loads(done.stdout)["targets"]
    checks = {check["name"]: (check["before"], check["after"]) for check in target["checks"]}
    assert checks["own"] == checks["number"] == ("1", "2")


def wheel(repo: Repo, version: int) -> None:
    import zipfile

    info = f"tiny_number-{version}.dist-info"
    with zipfile.ZipFile(repo.path / f"tiny_number-{version}-py3-none-any.whl", "w") as file:
        file.writestr("tiny_number.py", f"NUMBER = {version}\n")
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: tiny-number\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: a\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


CONFIG = """
[defaults]
timed = false
[[target]]
name = "first"
target = "model.py"
limits = { latency = "900%" }
[[target]]
name = "second"
target = "other.py"
"""


def test_targets_of_a_file_are_resumed_where_a_run_was_stopped(repo: Repo):
    (repo.path / "fxopt.toml").write_text(CONFIG)
    repo.commit(other=MODEL + "import time, os\nif os.path.exists('../wait'): time.sleep(60)\n")
    waiting = repo.path.parent / "wait"
    waiting.touch()
    command = [sys.executable, "-m", "fxopt", "ci"]
    with subprocess.Popen(command, cwd=repo.path, env=repo.environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "second: load base" in line:
                break
        process.send_signal(signal.SIGTERM)
        process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM
    assert repo.left_behind() == []
    waiting.unlink()
    done = repo.ci("--format", "json")
    assert done.returncode == 0, done.stderr
    assert "1/2 first: found by the run before" in done.stderr
    assert [target["name"] for target in json.loads(done.stdout)["targets"]] == ["first", "second"]
    assert "found by the run before" not in repo.ci().stderr


def test_what_failed_is_tried_again_by_a_run_that_goes_on(repo: Repo, monkeypatch):
    """It may be the environment that was repaired meanwhile."""
    broken, stopped = repo.path.parent / "broken", [True]
    broken.touch()
    repo.commit(
        model=f"import os\nif os.path.exists({str(broken)!r}): raise OSError('not there')\n{MODEL}", other=MODEL
    )
    jobs = tuple(Job(name, name, timed=False) for name in ("other.py", "model.py", "other.py:model"))

    def stop(self: Contest, *arguments: Any) -> dict[str, Any]:
        if self._job.name == "other.py:model" and stopped:
            raise KeyboardInterrupt
        return run(self, *arguments)

    run = Contest.run
    monkeypatch.setattr(Contest, "run", stop)
    monkeypatch.chdir(repo.path)
    with pytest.raises(KeyboardInterrupt):
        run_gate(Plan(jobs, "HEAD", repo.path), launcher=repo.launcher)
    broken.unlink()
    stopped.clear()
    said: list[str] = []
    record = run_gate(Plan(jobs, "HEAD", repo.path), said.append, repo.launcher)
    assert [target["verdict"] for target in record["targets"]] == ["OK"] * 3
    assert [text for text in said if "found by the run before" in text] == ["1/3 other.py: found by the run before"]


def test_an_untracked_file_that_is_written_anew_is_another_change(repo: Repo, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(repo.path)
    assert Repository.here().changes() == ""
    repo.write(untracked="x = 1")
    before = Repository.here().changes()
    assert before
    repo.write(untracked="x = 22")
    assert Repository.here().changes() != before


def test_an_untracked_file_whose_name_is_no_utf_8_is_a_change(repo: Repo, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(repo.path)
    (repo.path / os.fsdecode(b"n\xe4me")).write_text("")
    assert Repository.here().changes()


def test_a_base_that_depends_on_nothing_has_the_environment_of_the_head(repo: Repo):
    (repo.path / "requirements.txt").write_text("torch\n")
    assert repo.only("model.py", timed=False)["verdict"] == "OK"


def test_a_list_of_packages_may_be_as_powershell_writes_it(repo: Repo):
    (repo.path / "requirements.txt").write_text("torch\n", encoding="utf-16")
    repo.commit()
    (repo.path / "requirements.txt").write_text("# the same\ntorch\n", encoding="utf-16")
    assert repo.only("model.py", timed=False)["verdict"] == "OK"


def test_inputs_that_are_objects_are_the_same_on_both_sides(repo: Repo):
    repo.commit(
        model=MODEL.replace("def forward(self, x):", "def forward(self, x, cache):\n        x = x + cache.shift")
        + "class Cache:\n    shift = 0\n    def __init__(self): self.shift = torch.ones(1)\n"
        + "example_inputs = (example_inputs, Cache())\n"
    )
    assert repo.only("model.py", timed=False)["inputs"] == "4x3x16x16 float32, Cache(1 float32)"


@pytest.mark.parametrize(
    ("before", "after", "error"),
    [
        ("torch.view_as_complex(y)", "torch.view_as_complex(y * torch.tensor([1.0, 2.0]))", True),
        ("y.masked_fill(y > 0, float('-inf'))", "y.masked_fill(0 < y, float('-inf'))", False),
    ],
    ids=["an imaginary part counts", "equal infinities are no error"],
)
def test_outputs_of_every_kind_of_number_are_compared(repo: Repo, before, after, error):
    text = MODEL.replace("return self.fc(self", "y = self.fc(self") + "\n"
    returns = text.replace(".mean((2, 3)))", ".mean((2, 3)))\n        return {}")
    repo.commit(model=returns.format(before))
    repo.write(model=returns.format(after))
    target = repo.only(timed=False, output_error=1e-3, code=3 if error else 0)
    (check,) = [check for check in target["checks"] if check["name"] == "output error"]
    assert check["status"] == ("failed" if error else "ok")


def test_the_mode_that_evaluate_leaves_is_not_that_of_the_outputs(repo: Repo):
    repo.commit(model=MODEL + "\ndef evaluate(module): return {'one': 1.0}\n")
    repo.write(model=MODEL + "\ndef evaluate(module):\n    module.train()\n    return {'one': 1.0}\n")
    assert repo.only("model.py", timed=False, output_error=0.0)["verdict"] == "OK"


def test_names_of_files_that_are_not_ascii_are_said_as_they_are(repo: Repo, monkeypatch: pytest.MonkeyPatch):
    repo.commit(modèle=MODEL)
    repo.write(modèle=SLOWER, äußere=MODEL)
    monkeypatch.chdir(repo.path)
    assert Repository.here().uncommitted() == ["modèle.py", "äußere.py"]
    assert Repository.here().changed_files("HEAD") == ["modèle.py"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind_however_it_ends(repo: Repo, number):
    repo.commit(model=MODEL + "import time, os\nprint('PID', os.getpid(), flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "fxopt", "ci", "model.py"]
    # A shell starts what runs in its background, these tests maybe, with Ctrl-C ignored.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, cwd=repo.path, env=repo.environment, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "load base and head" in line:
                break
        began = time.monotonic()
        while not (logs := [log for log in repo.path.parent.glob("fxopt-gate-*/log") if "PID" in log.read_text()]):
            assert time.monotonic() - began < 60
            time.sleep(0.1)
        worker = int(logs[0].read_text().split("PID ")[1].split()[0])
        process.send_signal(number)
        said = process.stderr.read()
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(worker, 0)
            time.sleep(0.1)
    assert "Traceback" not in said
    if number == signal.SIGKILL:
        repo.write(model=MODEL)
        repo.ci("nothing.py", *QUICK)  # the next run takes away what this one could not
    else:
        assert process.returncode == 128 + number
        assert ("no report was written" in said) is (number == signal.SIGINT)  # but what is finished is kept
    assert repo.left_behind() == []


def test_of_worktrees_whose_directory_is_not_there_only_its_own_are_forgotten(repo: Repo, tmp_path):
    with subprocess.Popen(["true"]) as ended:
        pass
    for directory in ("disk", f"fxopt-ci-{ended.pid}-x"):
        repo.git("worktree", "add", "--detach", "--quiet", str(tmp_path / directory / "base"))
        shutil.rmtree(tmp_path / directory)
    repo.gate(timed=False)
    assert [tree.split()[0] for tree in repo.left_behind()] == [str(tmp_path / "disk" / "base")]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["model.py", "--base", "nowhere"], 2, "there is no commit 'nowhere'"),
        (["model.py", "--base", "--output=x"], 2, "there is no commit"),
        (["model.py", "--fail-over", "lots"], 2, "--fail-over: 'lots' is no share"),
        (["model.py", "--passes", "fuze"], 2, "did you mean 'fuse'?"),
        ([], 2, "there is no 'fxopt.toml'"),
        (["--input", "1x3x16x16"], 2, "--input and --weights are for one target"),
        (["model.py", "--json", "out/record.json"], 2, "--json: there is no directory 'out'"),
        (["model.py", "--json", "."], 2, "--json: '.' is a directory: expected a file to write"),
        (["model.py", "--html", "page.html", "--history", "h.jsonl"], 2, "there is no file of baselines 'h.jsonl'"),
        (["model.py", "--source-url", "https://a/{file}#{line}"], 2, "--source-url: goes with --html"),
        (["model.py", "--base-python", "/nothing"], 2, "'/nothing' does not start"),
    ],
)
def test_wrong_calls(repo: Repo, arguments, code, said):
    done = repo.ci(*arguments, *QUICK)
    assert done.returncode == code, done.stderr + done.stdout
    assert said in done.stderr + " ".join(done.stdout.split()) and "Traceback" not in done.stderr
    assert repo.left_behind() == []


def test_a_repository_without_a_commit(make_repo):
    with pytest.raises(GateError, match="nothing was committed there yet"):
        make_repo("new").gate()


def test_a_hook_of_the_user_is_not_run_for_the_base(repo: Repo):
    hook = repo.path / ".git" / "hooks" / "post-checkout"
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    assert repo.only(timed=False)["verdict"] == "OK"


def test_a_branch_that_was_never_fetched_says_how_to_get_it(repo: Repo, tmp_path, monkeypatch):
    repo.git("branch", "feature/x")
    subprocess.run(["git", "clone", "--quiet", "--single-branch", repo.path, tmp_path / "clone"], check=True)
    monkeypatch.chdir(tmp_path / "clone")
    with pytest.raises(GateError, match="gets it, if it is there") as caught:
        Repository.here().resolve("origin/feature/x")
    subprocess.run(str(caught.value).split("`")[1].split(), check=True)
    assert Repository.here().resolve("origin/feature/x") == Repository.here().resolve("HEAD")


def test_outside_of_a_repository(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fxopt", "ci", "model.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 2 and "in no git repository" in done.stderr


def test_a_repository_that_git_refuses_is_said_in_the_words_of_git(repo: Repo):
    done = repo.ci("model.py", GIT_TEST_ASSUME_DIFFERENT_OWNER="1")
    assert done.returncode == 2 and "dubious ownership" in done.stderr and "safe.directory" in done.stderr


def test_a_summary_that_cannot_be_written_costs_nothing_else(repo: Repo):
    done = repo.ci("model.py", "--no-latency", "--json", "record.json", GITHUB_STEP_SUMMARY="/nowhere/summary")
    assert done.returncode == 0
    assert "fxopt: GITHUB_STEP_SUMMARY: cannot write '/nowhere/summary': No such file" in done.stderr
    assert (repo.path / "record.json").exists()


def test_a_shallow_clone_says_how_to_get_the_history(repo: Repo, make_repo):
    repo.commit(other="")
    clone = make_repo("clone")
    clone.git("fetch", "--quiet", "--depth", "1", f"file://{repo.path}", "main")
    clone.git("checkout", "--quiet", "FETCH_HEAD")
    done = clone.ci("model.py", "--base", "HEAD~1")
    assert done.returncode == 2 and "shallow" in done.stderr and "fetch-depth: 0" in done.stderr


@pytest.mark.parametrize(
    ("base", "head", "target", "code", "said"),
    [
        (MODEL, MODEL, "new.py", 5, "there is no file 'new.py'"),
        (MODEL, MODEL, "nothing.py", 2, "there is no file 'nothing.py'"),
        ("raise ValueError('broken then')", MODEL, "model.py", 5, "broken then"),
        (MODEL, "raise ValueError('broken now')", "model.py", 2, "broken now"),
        (MODEL, MODEL.replace("(4, 3", "(2, 3"), "model.py", 5, "the inputs are 2x3x16x16 float32, in the base 4x3"),
        (MODEL, MODEL + "\nimport os\nos.abort()", "model.py", 1, "the process died"),
        (MODEL, MODEL.replace("return", "__import__('time').sleep(4)\n        return"), "model.py", 2, "too slow"),
    ],
)
def test_what_cannot_be_compared(repo: Repo, base, head, target, code, said):
    repo.commit(model=base)
    repo.write(model=head, new=MODEL)
    found = repo.only(target, code=code)
    assert said in found["notes"][0]
    assert repo.left_behind() == []


@pytest.mark.parametrize(
    ("target", "code", "said"),
    [
        ("net.py", 5, "does not have it yet: there is no file 'net.py'; a new target gets its first comparison"),
        ("nothing.py", 2, "head: there is no file 'nothing.py'"),
        ("../../model.py", 0, None),
    ],
)
def test_in_a_folder_that_is_new_what_counts_is_the_target(repo: Repo, target, code, said):
    (repo.path / "new" / "deep").mkdir(parents=True)
    (repo.path / "new" / "deep" / "net.py").write_text(MODEL)
    found = repo.only(target, code=code, below="new/deep", timed=False)
    assert said is None or said in found["notes"][0]


def test_a_model_whose_file_was_renamed_is_held_against_the_file_that_it_was(repo: Repo):
    (repo.path / "nets").mkdir()
    repo.git("mv", "model.py", "nets/small.py")
    (repo.path / "nets" / "small.py").write_text(SLOWER)
    found = repo.only("small.py:model", code=3, below="nets")
    assert found["latency"]["verdict"] == "REGRESSION"
    assert found["notes"] == ["the base has it as '../model.py:model'"]


def test_submodules_of_the_base_are_those_that_it_names(repo: Repo, make_repo):
    inner, outer = make_repo("inner"), make_repo("outer")
    inner.commit(width="WIDTH = 8")
    outer.commit(model=MODEL)
    submodule = ("-c", "protocol.file.allow=always", "submodule", "--quiet")
    for parent, child in ((outer, inner), (repo, outer)):
        parent.git(*submodule, "add", str(child.path), child.path.name)
        parent.commit()
    repo.git(*submodule, "update", "--init", "--recursive")
    wide = MODEL.replace("nn.Linear(8, 2)", "nn.Linear(8, 2); from outer.inner.width import WIDTH; self.wide = WIDTH")
    repo.commit(model=wide + "\nmodel.extra = nn.Linear(model.wide, 2)\n")
    (repo.path / "outer" / "inner" / "width.py").write_text("WIDTH = 500")
    found = repo.only(code=3, timed=False)
    (check,) = [check for check in found["checks"] if check["status"] == "failed"]
    assert check["name"] == "size"
    for below in ("outer", "outer/inner"):
        assert len(repo.git("-C", below, "worktree", "list").splitlines()) == 1
    assert repo.left_behind() == []


def test_a_folder_that_is_a_file_in_the_base(repo: Repo):
    (repo.path / "net").write_text("")
    repo.commit()
    (repo.path / "net").unlink()
    (repo.path / "net").mkdir()
    with pytest.raises(BaselineError, match=r"'net' is no directory in base .*: call from another"):
        repo.gate(below="net")


def test_a_side_that_is_busy_ends_with_its_target(repo: Repo, tmp_path):
    log = tmp_path / "pid"
    repo.commit(model=f"import os, time\nopen({str(log)!r}, 'w').write(str(os.getpid()))\ntime.sleep(60)")
    repo.write(model=f"import os, time\nwhile not os.path.exists({str(log)!r}): time.sleep(0.1)\nraise ValueError")
    repo.only(code=2)
    with pytest.raises(ProcessLookupError):
        for _ in range(100):
            os.kill(int(log.read_text()), 0)
            time.sleep(0.1)


@pytest.mark.parametrize("where", ["head", "base"])
def test_a_side_that_never_answers_is_ended_and_says_where_it_is_stuck(repo: Repo, monkeypatch, where):
    monkeypatch.setattr(processes, "_LONGEST_ANSWER", 3.0)
    stuck = MODEL.replace("def forward(self, x):", "def forward(self, x):\n        while True: x = x + 1")
    base = repo.commit(model=stuck if where == "base" else MODEL)
    repo.write(model=stuck if where == "head" else MODEL)
    (said,) = repo.only(base=base, code=1)["notes"]
    assert re.search(rf"{where}.*: no answer in 3 s; it is stuck at .*model\.py:12$", said), said


def test_an_absolute_target_is_that_of_either_checkout(repo: Repo):
    repo.write(model=MODEL + "\nmodel.extra = nn.Linear(500, 500)\n")
    target = repo.only(str(repo.path / "model.py"), code=3, timed=False)
    assert target["name"] == target["target"] == "model.py"
    with pytest.raises(GateError, match="is outside of the repository"):
        repo.gate("../model.py")
