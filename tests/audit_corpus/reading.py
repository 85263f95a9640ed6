"""The cases of the corpus: which class of which file has which fault, and on which line."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fxopt.findings import Subject
from fxopt.inputs import Inputs

FOLDER = Path(__file__).parent
VARIANTS = ("Plain", "Nested", "Inherited")


@dataclass(frozen=True)
class Case:
    """One class. `line` is that of its fault; None for a corrected twin."""

    rule: str
    name: str
    line: int | None

    def __str__(self) -> str:
        return f"{self.rule}-{self.name}"

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.rule.lower()}.py"

    def subject(self) -> Subject:
        torch.manual_seed(0)
        module = importlib.import_module(f"tests.audit_corpus.{self.rule.lower()}")
        made: nn.Module = getattr(module, self.name)()
        return Subject(str(self), made, Inputs(module.INPUTS))


def cases() -> Iterator[Case]:
    for path in sorted(FOLDER.glob("fx*.py")):
        rule = path.stem.upper()
        lines = path.read_text(encoding="utf-8").splitlines()
        for variant in VARIANTS:
            mark = f"# fault: {rule} {variant.lower()}"
            line = next(number for number, text in enumerate(lines, 1) if mark in text)
            yield Case(rule, variant, line)
            yield Case(rule, f"{variant}Fixed", None)
