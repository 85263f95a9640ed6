"""FX102: submodules in a plain list, tuple or dict."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from torch import nn

from fxopt.findings import Finding, Fix, Severity
from passes.audit.evidence import Evidence, code
from passes.audit.rule import Rule


def _fix(kind: type, name: str, value: Any) -> Fix | None:
    places = list(code.assignments(kind, name))
    if len(places) != 1 or not isinstance(value, (list, dict)):
        return None
    path, statement = places[0]
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    if not isinstance(statement.value, (ast.List, ast.ListComp, ast.Dict, ast.DictComp)):
        return None
    container = "nn.ModuleDict" if isinstance(value, dict) else "nn.ModuleList"
    text = f"{' ' * statement.col_offset}self.{name} = {container}({ast.unparse(statement.value)})"
    return Fix(path, statement.lineno, statement.end_lineno or statement.lineno, text, f"use {container}")


class UnregisteredModule(Rule):
    """Submodules in a plain list, tuple or dict.

    Their parameters are not trained, moved or saved, and `eval()` doesn't reach them.

    Bad:
        self.layers = [nn.Linear(4, 4) for _ in range(3)]

    Good:
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    Fix: use `nn.ModuleList` or `nn.ModuleDict`.
    """

    id = "FX102"
    name = "unregistered-module"
    group = "registration"
    severity = Severity.ERROR

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        known = {id(module) for _, module in evidence.modules}
        for path, module in evidence.users:
            for name, value in vars(module).items():
                if name.startswith("_") and name in ("_modules", "_parameters", "_buffers"):
                    continue
                if not isinstance(value, (list, tuple, dict)):
                    continue
                items = list(value.values() if isinstance(value, dict) else value)
                hidden = [item for item in items if isinstance(item, nn.Module) and id(item) not in known]
                if hidden:
                    kind = type(value).__name__
                    message = f"'self.{name}' is a plain {kind} with {len(hidden)} modules that are not registered"
                    place = code.assigned(type(module), name)
                    yield self.found(message, place, path, fix=_fix(type(module), name, value))
