"""FX105: `__init__` of a module that doesn't call that of its base class."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from fxopt.findings import Severity
from passes.audit.evidence import Evidence, code
from passes.audit.rule import Found, rule


def _files(evidence: Evidence) -> set[str]:
    found = {code.class_node(kind) for _, kind in evidence.classes}
    own = {item[0] for item in found if item is not None and not code.is_installed(item[0])}
    return own | set(evidence.subject.files)


def _calls_base(function: ast.FunctionDef) -> bool:
    return not {"__init__", "__setstate__", "__dict__"}.isdisjoint(n.attr for n in code.parts(ast.Attribute, function))


@rule("FX105", Severity.ERROR)
def missing_super_init(evidence: Evidence) -> Iterator[Found]:
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
    for path in sorted(_files(evidence)):
        for node in code.modules_in(path):
            start = next((i for i in node.body if isinstance(i, ast.FunctionDef) and i.name == "__init__"), None)
            if start is not None and not _calls_base(start):
                yield Found(f"'{node.name}.__init__' never calls that of its base class", code.at(path, start))
