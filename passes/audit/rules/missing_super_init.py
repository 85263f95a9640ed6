"""FX105: `__init__` of a module that doesn't call that of its base class."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from fxopt.findings import Finding, Severity
from passes.audit.evidence import Evidence, code
from passes.audit.rule import Rule


def _files(evidence: Evidence) -> set[str]:
    found = {code.class_node(kind) for _, kind in evidence.classes}
    own = {item[0] for item in found if item is not None and not code.is_installed(item[0])}
    return own | set(evidence.subject.files)


def _calls_base(function: ast.FunctionDef) -> bool:
    return any(
        isinstance(node, ast.Attribute) and node.attr in ("__init__", "__setstate__", "__dict__")
        for node in ast.walk(function)
    )


class MissingSuperInit(Rule):
    """`__init__` of a module that doesn't call that of its base class.

    Without it nothing can be registered: the first submodule that is set raises.

    Bad:
        def __init__(self):
            self.fc = nn.Linear(4, 4)

    Good:
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

    Fix: call `super().__init__()` first.
    """

    id = "FX105"
    name = "missing-super-init"
    group = "registration"
    severity = Severity.ERROR

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        trees = [(path, code.syntax(path)) for path in sorted(_files(evidence))]
        for path, tree in trees:
            classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)] if tree else []
            modules = code.modules_among(classes)
            for node in classes:
                start = next((i for i in node.body if isinstance(i, ast.FunctionDef) and i.name == "__init__"), None)
                if node.name in modules and start is not None and not _calls_base(start):
                    yield self.found(f"'{node.name}.__init__' never calls that of its base class", code.at(path, start))
