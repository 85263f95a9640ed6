"""`fxopt bench` by real processes."""

from __future__ import annotations

import json
import subprocess
import sys

import jsonschema
import pytest

from fxopt.bench import cold_start
from fxopt.record import schema


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fxopt", "bench", *arguments, "--device", "cpu", "--budget", "0.5"]
    return subprocess.run(command, capture_output=True, text=True)


def test_table(write):
    write("example_inputs = torch.randn(2, 3)\nprint('hello')")
    done = bench("model.py", "--batch", "1,2", "--interop", "1", "--threads", "1", "--pin", "0")
    assert done.returncode == 0, done.stderr
    for text in ("Latency", "Throughput, cpu", "aten::addmm", "fc Linear", "resident before", "second call"):
        assert text in done.stdout
    assert "hello" not in done.stdout and "hello" in done.stderr


def test_json_holds_raw_times_and_what_is_not_measured_says_why(write):
    write("example_inputs = torch.randn(2, 3)")
    done = bench("model.py", "--format", "json", "--quiet", "--no-cold", "--batch", "1")
    record = json.loads(done.stdout)
    jsonschema.validate(record, schema("bench"), cls=jsonschema.Draft202012Validator)
    assert record["kind"] == "bench" and record["cold_start"] == {"not_measured": "not asked for"}
    assert len(record["devices"]["cpu"]["latency"]["times"]) >= 6
    assert record["machine"]["threads"] >= 1


def test_a_cold_start_that_fails_says_why(write):
    write(
        "import os\nexample_inputs = torch.randn(2, 3)\nif os.environ.get('SECOND'): raise ValueError('only once')\n"
        "os.environ['SECOND'] = '1'"
    )
    done = bench("model.py", "--batch", "1")
    assert done.returncode == 0, done.stderr
    assert "only once" in done.stdout


def test_a_cold_start_begins_where_the_command_did(write, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    write("import os\nexample_inputs = torch.randn(2, 3)\nos.chdir('elsewhere')\n")
    done = bench("model.py", "--format", "json", "--batch", "1")
    assert "not_measured" not in json.loads(done.stdout)["cold_start"]


def test_a_cold_start_imports_what_the_command_does_and_takes_no_file_for_fxopt(write, tmp_path, monkeypatch):
    write("import beside\nexample_inputs = torch.randn(2, 3)", "nets/model.py")
    write("import os\nos.write(2, b'no UTF-8: \\xff')", "beside.py")
    write("", "fxopt.py")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert cold_start("nets/model.py").first_call > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["model.py", "--batch", "1,zero"], "no list of numbers from 1"),
        (["model.py", "--batch", f"1,{10**20}"], "no list of numbers from 1"),
        (["model.py", "--seed", str(10**20)], "should be less than or equal to 4294967295"),
        (["model.py", "--threads", str(10**20)], "should be less than or equal to 4096"),
        (["model.py", "--pin", "4096"], "this process may run on"),
        (["nothing.py"], "there is no file 'nothing.py'"),
    ],
)
def test_wrong_calls(write, arguments, said):
    write("example_inputs = torch.randn(2, 3)")
    done = bench(*arguments, "--no-cold")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert said in " ".join(done.stderr.split())
