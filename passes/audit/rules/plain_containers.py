"""FX102 and FX103: submodules and parameters in a plain list, tuple or dict."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils import _pytree as pytree

from fxopt.findings import Fix, Severity
from passes.audit.evidence import Evidence, code
from passes.audit.evidence.driver import unregistered
from passes.audit.rule import Found, rule


def _fix(kind: type, name: str, value: Any) -> Fix | None:
    places = list(code.assignments(kind, name))
    if len(places) != 1 or not isinstance(value, (list, dict)):
        return None
    path, statement = places[0]
    if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
        return None
    if not isinstance(statement.value, (ast.List, ast.ListComp, ast.Dict, ast.DictComp)):
        return None
    container = "ModuleDict" if isinstance(value, dict) else "ModuleList"
    names = {meaning: name for name, meaning in code.imported(path).items()}
    if "torch.nn" not in names or not _can_be(getattr(nn, container), kind, name, value):
        return None
    called = f"{names['torch.nn']}.{container}"
    return code.with_value(path, statement, lambda v: f"self.{name} = {called}({v})", f"use {called}")


_READERS = {"len", "list", "tuple", "iter", "enumerate", "zip", "reversed", "dict", "sorted", "set"}


def _can_be(container: type, kind: type, name: str, value: Any) -> bool:
    """Whether a container of modules can stand for `value`: all are modules, and all uses of it are known there."""
    items = value.values() if isinstance(value, dict) else value
    if not all(isinstance(item, nn.Module) for item in items):
        return False
    keys = value if isinstance(value, dict) else ()
    if not all(isinstance(key, str) and key and "." not in key and not hasattr(container, key) for key in keys):
        return False
    return all(_fits(container, use, around) for use, around in _uses(kind, name))


def _uses(kind: type, name: str) -> Iterator[tuple[ast.Attribute, ast.AST]]:
    """Every `self.name` in the text of a class, and what it stands in."""
    for _, _, node in code.bases(kind):
        for around in ast.walk(node):
            for part in ast.iter_child_nodes(around):
                if isinstance(part, ast.Attribute) and code.self_attribute(part) == name:
                    yield part, around


def _fits(container: type, use: ast.Attribute, around: ast.AST) -> bool:
    """Whether that use does the same with a container of modules."""
    if isinstance(around, ast.Attribute):
        return around.attr != "pop" and hasattr(container, around.attr)  # theirs takes no default
    if isinstance(around, ast.Call):
        return ast.unparse(around.func) in _READERS
    if isinstance(around, ast.Compare):
        return all(isinstance(operator, (ast.In, ast.NotIn)) for operator in around.ops)
    return isinstance(around, (ast.Subscript, ast.For, ast.comprehension, ast.Starred, ast.Assign)) and (
        not isinstance(around, ast.Assign) or use in around.targets
    )


def _is_plain_function(module: nn.Module) -> bool:
    """Whether there is nothing to register: torch's own, without state, and the same in training."""
    parts = list(module.modules())
    own = all(type(part).__module__.startswith("torch.nn.") for part in parts)
    differs = any(isinstance(part, (_DropoutNd, nn.RReLU)) for part in parts)
    return own and not differs and not [*module.parameters(), *module.buffers()]


@rule("FX102", Severity.ERROR)
def unregistered_module(evidence: Evidence) -> Iterator[Found]:
    """Submodules in a plain list, tuple or dict.

    Their parameters are not trained, moved or saved, and `eval()` doesn't reach them.

    Bad:
        self.layers = [nn.Linear(4, 4) for _ in range(3)]

    Good:
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    Fix: use `nn.ModuleList` or `nn.ModuleDict`.
    """
    known = {id(module) for _, module in evidence.modules}
    for path, module in evidence.users:
        for name, value in unregistered(module):
            if not isinstance(value, (list, tuple, dict)):
                continue
            leaves = pytree.tree_leaves(list(value.values()) if isinstance(value, dict) else list(value))
            modules = [leaf for leaf in leaves if isinstance(leaf, nn.Module)]
            hidden = [each for each in modules if id(each) not in known and not _is_plain_function(each)]
            if hidden:
                kind = type(value).__name__
                message = f"'self.{name}' is a plain {kind} with {len(hidden)} modules that are not registered"
                place = code.assigned(type(module), name)
                yield Found(message, place, path, fix=_fix(type(module), name, value))


@rule("FX103", Severity.ERROR)
def unregistered_parameter(evidence: Evidence) -> Iterator[Found]:
    """Parameters in a plain list, tuple or dict.

    `parameters()` doesn't give them to the optimizer, and they are neither moved nor saved.

    Bad:
        self.scales = [nn.Parameter(torch.ones(3))]

    Good:
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(3))])

    Fix: use `nn.ParameterList` or `nn.ParameterDict`.
    """
    known = {id(each) for _, module in evidence.modules for each in module._parameters.values()}
    for path, module in evidence.users:
        for name, value in unregistered(module):
            leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, nn.Parameter)]
            hidden = [leaf for leaf in leaves if id(leaf) not in known]
            if hidden:
                message = f"'self.{name}' holds {len(hidden)} parameters that are not registered"
                yield Found(message, code.assigned(type(module), name), path)
