"""The laws of the house that a machine can check: which part may import which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENTRY_POINTS = {"fxopt.__main__"}


def modules() -> dict[str, Path]:
    """All modules of both packages by dotted name."""
    found = {}
    for package in ("fxopt", "passes"):
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(name: str, path: Path) -> Iterator[str]:
    """What a module imports, wherever in it: `from a import b` is both `a` and `a.b`."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).rstrip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


MODULES = modules()
IMPORTS = [(name, target) for name, path in MODULES.items() for target in imported(name, path)]


def test_there_is_something_to_check():
    assert len(MODULES) > 20
    assert len(IMPORTS) > 100


def test_the_engine_knows_no_pass():
    assert [(name, target) for name, target in IMPORTS if inside(name, "fxopt") and inside(target, "passes")] == []


def test_passes_do_not_import_each_other():
    def owner(name: str) -> str:
        return name.split(".")[1]

    wrong = [
        (name, target)
        for name, target in IMPORTS
        if name.startswith("passes.")
        and inside(target, "passes")
        and (target == "passes" or owner(target) != owner(name))
    ]
    assert wrong == []


@pytest.mark.parametrize("package", ["fxopt.report", "fxopt.cli"])
def test_nobody_imports_what_faces_the_user(package):
    allowed = ENTRY_POINTS if package == "fxopt.cli" else set()
    wrong = [
        (name, target)
        for name, target in IMPORTS
        if inside(target, package)
        and not inside(name, package)
        and not inside(name, "fxopt.cli")
        and name not in allowed
    ]
    assert wrong == []


def test_only_the_registry_and_the_loader_import_by_name():
    calls = ("import_module(", "spec_from_file_location(", "__import__(", ".load_module(")
    found = {name for name, path in MODULES.items() if any(call in path.read_text(encoding="utf-8") for call in calls)}
    assert found <= {"fxopt.registry", "fxopt.target.source"}


def test_no_module_is_named_after_nothing():
    empty = {"util", "utils", "helper", "helpers", "misc", "common", "manager"}
    assert [name for name in MODULES if empty & set(name.split("."))] == []
