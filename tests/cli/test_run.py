"""`fxopt run` by real processes: what it prints and keeps, and every bad input."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

CONV = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 2)
    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).relu().mean((2, 3)))

model = Net()
example_inputs = torch.randn(4, 3, 12, 12)
"""
QUICK = ["--budget", "1", "--device", "cpu"]


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fxopt", "run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


def entries(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir() if entry.name != "__pycache__"}


def refused(done: subprocess.CompletedProcess[str], *said: str, code: int = 2) -> None:
    assert "Traceback" not in done.stderr
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    for text in said:
        assert text in done.stderr


def test_the_table_is_on_stdout_and_progress_is_not(write):
    write("print('hello from the model')", header=CONV)
    done = run("model.py", "--passes", "clean,fuse,qat", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "fuse" in done.stdout
    assert "conv" in done.stdout
    assert "hello" not in done.stdout
    assert "hello" in done.stderr
    assert "fuse" in done.stderr


def test_json_alone_on_stdout_when_quiet(write):
    write("def evaluate(module): return {'mean': module(example_inputs).mean()}", header=CONV)
    done = run("model.py", "--passes", "fuse", "--format", "json", "--quiet", *QUICK)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    record = json.loads(done.stdout)
    assert record["target"] == "model.py"
    assert record["verified"] is True
    assert [item["name"] for item in record["passes"]] == ["fuse"]
    assert record["metrics"]["before"]["mean"] == pytest.approx(record["metrics"]["after"]["mean"], abs=1e-4)
    assert record["latency"]["cpu"]["ratio"] > 0


def test_the_layers_are_ranked_and_an_accuracy_held(write):
    write(
        "def calibration_data(): return [example_inputs]\n"
        "wanted = model.eval()(example_inputs).detach()\n"
        "def evaluate(module): return {'accuracy': 1 - (module(example_inputs) - wanted).norm() / wanted.norm()}",
        header=CONV,
    )
    done = run("model.py", "--passes", "fuse,ptq{bits=2}", "--sensitivity", "--max-drop", "0.1%", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "SQNR with it alone quantised" in done.stdout
    assert "it stays a float: accuracy is 1 then, and 0.999 was to be held" in " ".join(done.stdout.split())
    refused(run("model.py", "--max-drop", "much", *QUICK), "'much' is no share; write 0.5%, or 0.005")


def test_threads_are_those_of_the_call_whatever_the_file_sets(write):
    write("torch.set_num_threads(1)", header=CONV)
    done = run("model.py", "--threads", "2", "--format", "json", *QUICK)
    record = json.loads(done.stdout)
    assert record["machine"]["threads"] == record["latency"]["cpu"]["threads"] == 2


def test_markdown(write):
    write("", header=CONV)
    done = run("model.py", "--passes", "fuse", "--format", "markdown", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "| " in done.stdout


def test_a_target_by_module_with_inputs_by_flag(write):
    write("del model, example_inputs", "package/nets.py", header=CONV)
    done = run("package.nets:Net", "--input", "1x3x16x16", "--format", "json", *QUICK)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["inputs"] == "1x3x16x16 float32"


def test_a_guess_is_said_with_its_flag(write):
    write("del example_inputs", header=CONV)
    done = run("model.py", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "--input 1x3x224x224" in done.stdout + done.stderr


def test_out_keeps_the_result_and_replaces_an_older_one(write, tmp_path):
    write("", header=CONV)
    for spec in ("fuse", "fuse,qat"):
        done = run("model.py", "--passes", spec, "--out", "kept/result", *QUICK)
        assert done.returncode == 0, done.stderr
    kept = tmp_path / "kept" / "result"
    assert entries(tmp_path / "kept") == {"result"}
    assert entries(kept) == {
        "report.json",
        "report.md",
        "weights.safetensors",
        "inputs.safetensors",
        "recipe.json",
        "graph.py",
    }
    assert json.loads((kept / "recipe.json").read_text())["spec"] == "fuse,qat"
    assert json.loads((kept / "report.json").read_text())["verified"] is True
    compile((kept / "graph.py").read_text(), "graph.py", "exec")


def test_paths_are_those_of_the_call_wherever_the_file_goes(write, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write("import os\nos.chdir('elsewhere')\n", header=CONV)
    torch.save({"conv.weight": torch.ones(8, 3, 3, 3)}, tmp_path / "weights.pt")
    done = run("model.py", "--weights", "weights.pt", "--out", "kept", *QUICK)
    assert "the weights in" in done.stderr  # which were found
    done = run("model.py", "--out", "kept", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "recipe.json" in entries(tmp_path / "kept")
    assert entries(tmp_path / "elsewhere") == set()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing.py"], ["there is no file 'nothing.py'"]),
        (["model.py", "--passes", "fuze"], ["unknown pass 'fuze'; did you mean 'fuse'?", "\n  fuze\n  ^^^^"]),
        (["model.py", "--passes", "qat{bit=4}"], ["no option 'bit'; did you mean 'bits'?", "\n      ^^^"]),
        (["model.py", "--passes", "qat{bits=four}"], ["option 'bits' of pass 'qat'", "not four"]),
        (["model.py", "--input", "1x3xx"], ["--input 1x3xx", "expected [name=]SHAPE"]),
        (["model.py", "--input", "1x5x12x12"], ["1x5x12x12", "model.py:"]),
        (["model.py", "--weights", "none.safetensors"], ["there is no file 'none.safetensors'"]),
        (["model.py", "--out", "model.py"], ["'model.py' is a file"]),
        (["model.py", "--out", "model.py/deeper"], ["cannot write to 'model.py/deeper'"]),
        (["model.py", "--out", "."], ["'.' holds", "which fxopt did not write"]),
    ],
)
def test_a_bad_call_says_what_and_where(write, tmp_path, arguments, said):
    write("", header=CONV)
    before = entries(tmp_path)
    refused(run(*arguments, *QUICK), *said)
    assert entries(tmp_path) == before


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def broken(:", ["model.py:16", "`def broken(:`"]),
        ("raise OSError('no disk')", ["model.py:16", "OSError: no disk"]),
        ("del model, Net", ["'model.py' has no model"]),
        ("class Two(Net): ...\ndel model", ["class 'Two': `fxopt run model.py:Two`"]),
        ("Net.forward = lambda self, x: self.nothing", ["model.py:16", "nothing"]),
        ("def evaluate(module): return 3", ["'evaluate' of 'model.py' returned a int"]),
        ("def evaluate(module): raise OSError('no data')", ["model.py:16", "OSError: no data"]),
    ],
)
def test_a_bad_file_says_what_and_where(write, tmp_path, source, said):
    write(source, header=CONV)
    refused(run("model.py", "--out", "kept", *QUICK), *said)
    assert entries(tmp_path) == {"model.py"}


def test_outputs_that_are_not_numbers_are_named(write, tmp_path):
    write("model.fc.weight.data.fill_(float('nan'))", header=CONV)
    done = run("model.py", "--passes", "fuse", "--out", "kept", *QUICK)
    refused(done, "NaN", "4x3x12x12")
    assert entries(tmp_path) == {"model.py"}


def test_a_broken_promise_is_1_and_keeps_nothing(write, tmp_path):
    package = Path("liar-1.0.dist-info")
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: liar\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[fxopt.passes]\nliar = liar\n")
    write(
        """
        import operator
        from dataclasses import dataclass
        from typing import ClassVar
        from fxopt.contract import Change, Pass, Promise

        @dataclass(frozen=True)
        class Liar(Pass):
            "Doubles the output and says that nothing changed."
            name: ClassVar[str] = "liar"
            promise: ClassVar[Promise] = Promise.EXACT

            def run(self, region):
                (output,) = (node for node in region.graph.nodes if node.op == "output")
                value = output.args[0]
                doubled = region.insert_function(output, operator.mul, (value, 2))
                output.replace_input_with(value, doubled)
                yield Change("doubled the output", region.qualified(value))

        PASSES = (Liar,)
        """,
        "liar.py",
        header="",
    )
    write("", header=CONV)
    before = entries(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = run("model.py", "--passes", "liar", "--out", "kept", *QUICK, env=environment)
    refused(done, "liar", "doubled the output", code=1)
    assert entries(tmp_path) == before


def test_debug_shows_the_traceback(write):
    write("1 / 0")
    done = run("model.py", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError" in done.stderr


def test_ctrl_c_leaves_nothing_behind(write, tmp_path):
    write(
        """
        import time
        def evaluate(module):
            open("started", "w").close()
            time.sleep(60)
        """,
        header=CONV,
    )
    command = [sys.executable, "-m", "fxopt", "run", "model.py", "--passes", "fuse", "--out", "kept/result", *QUICK]
    # A shell that runs the tests in the background has told its children to ignore the signal.
    listen = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, preexec_fn=listen, **pipes)
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "started").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert "interrupted" in err
    assert entries(tmp_path) == {"model.py", "started"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_said(write):
    write("", header=CONV)
    done = run("model.py", "--passes", "fuse", "--budget", "1")
    assert done.returncode == 0, done.stderr
    assert "no CUDA device" in done.stdout


def test_an_engine_is_chosen_and_kept(write, tmp_path):
    write("", header=CONV)
    done = run("model.py", "--engine", "onednn", "--out", "out", "--budget", "1s", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "Engines" in done.stdout
    assert "onednn *" in done.stdout
    recipe = json.loads(Path("out/recipe.json").read_text())
    assert recipe["engine"]["name"] == "onednn"
    assert recipe["engine"]["choices"]["kernels"]


@pytest.mark.parametrize(("option", "places"), [("--prove", []), ("--prove=match", ["bn", "relu"])])
def test_passes_are_proven(write, option, places):
    write("", header=CONV)
    done = run(option, "model.py", "--format", "json", *QUICK)
    assert done.returncode == 0, done.stderr
    clean, fuse = json.loads(done.stdout)["passes"]
    assert clean["proofs"] == []
    assert [proof["where"] for proof in fuse["proofs"]] == ["", *places]
    assert fuse["proofs"][0]["latency"]["pairs"] > 0
    assert bool(fuse["changes"]) is fuse["proofs"][0]["kept"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--engine", "onedn"], "unknown engine 'onedn'; did you mean 'onednn'?"),
        (["--engine", "onednn", "--train"], "in training mode; call .eval()"),
        (["--max-error", "1e-2"], "max_error: it is for engines, and none is asked for"),
        (["--prove=each"], "prove: expected 'pass' to measure each pass, or 'match' each change, not 'each'"),
        (["--budget", "soon"], "'soon' is no time of at least 0.1 s; write 60s, or 2m"),
        (
            ["--sensitivity"],
            "sensitivity: it goes with a pass that quantises, and there is none; add one, such as `fuse,ptq`",
        ),
        (["--max-drop", "1%"], "max_drop: it goes with a pass that quantises"),
    ],
)
def test_wrong_engines_budgets_and_bounds(write, arguments, said):
    write("model.train()", header=CONV)
    done = run("model.py", "--device", "cpu", *arguments)
    assert said in " ".join(done.stderr.split())
    assert done.returncode == 2
