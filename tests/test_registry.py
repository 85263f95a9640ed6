"""Passes are found by entry point; whatever is wrong with one is said, never passed over."""

from __future__ import annotations

import sys
import textwrap
from importlib.metadata import EntryPoint
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn

from fxopt import registry, spec
from fxopt.contract import Pass
from fxopt.errors import PassError
from fxopt.optimize import optimize

HEADER = """
from dataclasses import dataclass
from typing import ClassVar
from fxopt.contract import Pass, Promise
"""
GOOD = (
    HEADER
    + """
@dataclass(frozen=True)
class One(Pass):
    name: ClassVar[str] = "one"
    promise: ClassVar[Promise] = Promise.EXACT
    def run(self, region):
        return iter(())
"""
)


@pytest.fixture
def point(tmp_path, monkeypatch):
    """Makes an entry point whose module has the given source."""
    numbers = count()
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(source: str, name: str = "third-party") -> EntryPoint:
        module = f"fxopt_test_passes_{next(numbers)}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        made.append(module)
        return EntryPoint(name, module, registry.GROUP)

    yield make
    for module in made:
        sys.modules.pop(module, None)


def test_finds_the_passes_of_a_third_party_package(point):
    found = registry.available([point(GOOD + "PASSES = (One,)\n")])
    assert list(found) == ["one"]
    assert issubclass(found["one"], Pass)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1", "offers no passes: expected a module with `PASSES"),
        ("PASSES = ()", "offers no passes"),
        (
            "import no_such_module_anywhere",
            "cannot import the passes of entry point 'third-party': ModuleNotFoundError",
        ),
        ("PASSES = (int,)", "expected a subclass of fxopt.Pass"),
        (GOOD + "PASSES = (One, One)", "two passes are named 'one'"),
        (GOOD.replace('name: ClassVar[str] = "one"', "") + "PASSES = (One,)", "has no name"),
        (GOOD.replace("promise: ClassVar[Promise] = Promise.EXACT", "") + "PASSES = (One,)", "promises nothing"),
        (GOOD.replace("@dataclass(frozen=True)", "") + "PASSES = (One,)", "is not a frozen dataclass"),
        (GOOD.replace("frozen=True", "") + "PASSES = (One,)", "is not a frozen dataclass"),
        (GOOD.replace("def run", "def walk") + "PASSES = (One,)", "does not define run"),
    ],
)
def test_says_what_is_wrong_with_an_entry_point(point, source, message):
    with pytest.raises(PassError) as raised:
        registry.available([point(source)])
    assert message in str(raised.value)


def test_names_both_sides_of_a_name_given_twice(point):
    first, second = point(GOOD + "PASSES = (One,)", "first"), point(GOOD + "PASSES = (One,)", "second")
    with pytest.raises(PassError, match=r"entry point 'first' and .* from entry point 'second'; rename one"):
        registry.available([first, second])


def test_the_library_is_found_like_any_other():
    import passes

    assert set(registry.available().values()) == set(passes.PASSES)


def test_the_pass_that_the_readme_shows_works(point):
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (source,) = (block for block in readme.split("```python\n")[1:] if "PASSES = " in block)
    known = registry.available([point(source.partition("```")[0])])
    module = nn.Sequential(nn.Linear(3, 3), nn.GELU()).eval()
    result = optimize(module, torch.randn(2, 3), spec.parse("quick-gelu", known), devices=())
    (change,) = result.ledger.changes
    assert (change.what, change.where) == ("computed by tanh", "1")
    assert module[1].approximate == "none"
    assert result.module.get_submodule("1").approximate == "tanh"
