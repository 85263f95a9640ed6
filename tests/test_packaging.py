"""The wheel: what is in it, and that it works on its own, outside of the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from fxopt.version import __version__

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def binaries(wheel, tmp_path_factory) -> Path:
    """The commands of a fresh environment with the wheel in it; what it depends on is read from this one."""
    home = tmp_path_factory.mktemp("environment")
    venv.create(home, with_pip=False, symlinks=True)
    python = home / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (site,) = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python.parent


def call(binaries: Path, *command: str, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    path = str(binaries / command[0])
    done = subprocess.run([path, *command[1:]], capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_its_packages_and_no_more(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    packages = {"fxopt", "passes", "pytest_fxopt"}
    assert {name.partition("/")[0] for name in names} == {*packages, f"fxopt-{__version__}.dist-info"}
    assert "fxopt/report/page/page.html" in names
    assert {"fxopt/py.typed", "passes/py.typed", "fxopt/record.schema.json"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    sources = {str(path.relative_to(ROOT)) for folder in packages for path in (ROOT / folder).rglob("*.py")}
    assert sources <= set(names)


def test_it_runs_outside_of_the_checkout(binaries, tmp_path):
    where = call(binaries, "python", "-c", "import fxopt, passes; print(fxopt.__file__, passes.__file__)", cwd=tmp_path)
    assert str(ROOT) not in where
    assert call(binaries, "fxopt", "--version", cwd=tmp_path) == f"fxopt {__version__}\n"
    assert "qat" in call(binaries, "fxopt", "passes", cwd=tmp_path)
    (tmp_path / "model.py").write_text("from torch import nn\nmodel = nn.Sequential(nn.Linear(4, 4), nn.ReLU())\n")
    report = call(binaries, "fxopt", "run", "model.py", "--passes", "fuse", "--budget", "1", cwd=tmp_path)
    assert "fuse" in report


def test_every_requirement_is_pinned(wheel):
    metadata = zipfile.ZipFile(wheel).read(f"fxopt-{__version__}.dist-info/METADATA").decode()
    wanted = set(re.findall(r"^Requires-Dist: ([\w.-]+)", metadata, re.MULTILINE))
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").split())
    assert wanted
    assert wanted <= set(pinned)
