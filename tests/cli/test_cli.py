"""The command itself, by real processes: help, versions, the list of passes, and how fast it starts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fxopt import registry
from fxopt.version import __version__

README = Path(__file__).parents[2] / "README.md"


def fxopt(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "fxopt", *arguments], capture_output=True, text=True, **options)


@pytest.mark.parametrize("command", [["-m", "fxopt"], [str(Path(sys.executable).with_name("fxopt"))]])
def test_version(command):
    start = [sys.executable] if command[0] == "-m" else []
    done = subprocess.run([*start, *command, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"fxopt {__version__}\n", "")


def test_the_interpreter_has_nothing_to_collect_when_a_command_ends():
    code = (
        "import atexit, gc; atexit.register(lambda: print(len(gc.get_objects()) < gc.get_freeze_count()));"
        "from fxopt.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True)
    assert done.stdout == f"fxopt {__version__}\nTrue\n"


def test_help_names_the_commands_and_their_options_in_full():
    said = fxopt("--help").stdout
    assert {"run", "passes"} <= set(said.split())
    assert not any(line.endswith("...") for line in said.splitlines()[1:])  # what a command does is told to its end
    assert {"--max-coverage-drop", "--max-memory-growth"} <= set(fxopt("ci", "--help").stdout.split())


@pytest.mark.parametrize(
    "arguments", [["run"], ["run", "model.py", "--nothing"], ["nothing"], ["run", "m.py", "--device", "tpu"]]
)
def test_a_wrong_call_is_2(arguments):
    done = fxopt(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr
    assert "Traceback" not in done.stderr


def test_passes_are_listed():
    done = fxopt("passes")
    assert done.returncode == 0
    assert all(name in done.stdout for name in registry.available())


def test_passes_as_json_hold_all_that_is_known():
    listed = json.loads(fxopt("passes", "--format", "json").stdout)
    assert [item["name"] for item in listed] == list(registry.available())
    assert all({"summary", "doc", "promise", "after", "conflicts", "options"} <= set(item) for item in listed)


@pytest.mark.parametrize("style", ["table", "markdown"])
def test_a_pass_shows_its_options(style):
    done = fxopt("passes", "qat", "--format", style)
    assert done.returncode == 0
    assert "bits" in done.stdout
    assert "per_channel" in done.stdout


def test_an_unknown_pass_is_met_with_the_nearest():
    done = fxopt("passes", "fuze")
    assert done.returncode == 2
    assert done.stderr == "fxopt: unknown pass 'fuze'; did you mean 'fuse'? `fxopt passes` lists them all\n"


@pytest.mark.parametrize("arguments", [["explain"], ["explain", "--fake"], ["lora", "merge", ".", "--out", "x"]])
def test_inputs_that_the_model_does_not_take_are_a_wrong_call(write, arguments):
    target = ["--target", "model.py"] if "lora" in arguments else ["model.py"]
    write("")
    done = fxopt(*arguments, *target, "--input", "2x5")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("fxopt: RuntimeError: ")
    assert "; raised by the forward of 'Net' itself at model.py:10" in done.stderr


def test_a_list_of_findings_that_cannot_be_written_is_refused_first(write):
    write("")
    done = fxopt("audit", "model.py", "--write-baseline", "no/such/list.json")
    assert done.returncode == 2
    assert done.stderr == (
        "fxopt: --write-baseline: there is no directory 'no/such' for 'no/such/list.json': make it first\n"
    )


def test_stdout_holds_the_report_alone_whatever_the_model_prints(write):
    write(
        """
        import ctypes, os
        def forward(self, x):
            print("by Python")
            os.system("echo by a process")
            ctypes.CDLL(None).puts(b"by C")
            return self.fc(x)
        Net.forward = forward
        """
    )
    for arguments in (["explain"], ["audit", "--fail-on", "never"]):
        done = fxopt(*arguments, "model.py", "--input", "2x3", "--format", "json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)
        assert all(text in done.stderr for text in ("by Python", "by a process", "by C"))


def test_the_readme_has_the_table_of_passes():
    begin, end = "<!-- passes: begin -->\n", "<!-- passes: end -->"
    table = README.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    assert table.strip() == fxopt("passes", "--format", "markdown").stdout.strip(), (
        "the table of passes in README.md is old: put there what `fxopt passes --format markdown` prints"
    )
