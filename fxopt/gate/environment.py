"""The Python that runs the base: this one, unless the dependencies differ."""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import site
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Callable
from pathlib import Path

from fxopt.errors import BaselineError
from fxopt.gate.revision import Repository

_LISTS = ("requirements.txt", "constraints.txt")
_NAMED = re.compile(r"(?:-r|--requirement|-c|--constraint)[\s=]*(.+)")


def environment(repository: Repository, commit: str, tree: Path, directory: Path, tell: Callable[[str], None]) -> str:
    """The interpreter for the base: one with its own packages over those of this one where it asks for others.

    What counts is what `requirements.txt` and `constraints.txt` in the top directory say, with the lists that they
    name, and `dependencies` in `pyproject.toml`.

    Raises:
        BaselineError: where its packages can't be installed.
    """
    then, now = _wanted(tree), _wanted(repository.root)
    asked = [*then["pyproject.toml"], *(["--requirement", "requirements.txt"] if then["requirements.txt"] else [])]
    if then == now or not asked:  # one that asks for nothing has all from here
        return sys.executable
    tell("install what the base depends on")
    home = directory / "environment"
    _run([sys.executable, "-m", "venv", "--without-pip", str(home)], commit)
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    own = Path(sysconfig.get_path("purelib", vars={"base": str(home), "platbase": str(home)}))
    # Everything that it does not say otherwise comes from here: torch, what is installed by its path, and fxopt itself.
    lines = [f"import site; site.addsitedir({str(path)!r})" for path in packages()]
    lines += dict.fromkeys(entry for entry in sys.path if Path(entry, "fxopt").is_dir())
    (own / "fxopt-shared.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    if (tree / "constraints.txt").exists():
        install += ["--constraint", "constraints.txt"]
    _run([*install, *asked], commit, tree)
    return str(python)


def packages() -> list[Path]:
    """Where this environment has its packages."""
    own = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    return [Path(path) for path in (*site.getsitepackages(), *own)]


def _wanted(root: Path) -> dict[str, list[str]]:
    found = {name: _lines(root / name) for name in _LISTS}
    project: list[str] = []
    if (root / "pyproject.toml").exists():
        with contextlib.suppress(tomllib.TOMLDecodeError):
            content = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8", errors="replace"))
            project = [str(one) for one in content.get("project", {}).get("dependencies", [])]
    return found | {"pyproject.toml": project}


def _lines(path: Path, above: frozenset[Path] = frozenset()) -> list[str]:
    """What a list says, and what the lists say that it names."""
    if path in above or not path.is_file():
        return []
    found = []
    for line in _text(path).splitlines():
        text = line.partition("#")[0].strip()
        found += [text] if text else []
        if named := _NAMED.match(text):
            found += _lines(path.parent / named[1], above | {path})
    return sorted(found)


def _text(path: Path) -> str:
    """A list as pip reads it: in UTF-8, or in UTF-16 as PowerShell writes it."""
    raw = path.read_bytes()
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return raw.decode("utf-16" if wide else "utf-8-sig", errors="replace")


def _run(command: list[str], commit: str, directory: Path | None = None) -> None:
    # The pins of whoever calls are those of the head, and their path may be relative to another directory.
    own = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    done = subprocess.run(command, cwd=directory, env=own, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise BaselineError(
            f"base {commit[:7]} depends on other packages, and they can't be installed: {said[-1] if said else ''}; "
            "make an environment for it and name its interpreter by --base-python"
        )
