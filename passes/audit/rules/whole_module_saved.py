"""FX504: a whole module saved in place of its state."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from torch import nn

from passes.audit.evidence import Evidence, code
from passes.audit.rule import Found, rule

_SCOPES = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _saves(node: ast.AST, around: tuple[ast.AST, ...]) -> Iterator[tuple[ast.Call, tuple[ast.AST, ...]]]:
    """Calls of `torch.save`, with the scopes around each, from the inside out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call) and ast.unparse(child.func) == "torch.save" and child.args:
            yield child, around
        yield from _saves(child, (child, *around) if isinstance(child, _SCOPES) else around)


def _assigned(scope: ast.AST, target: str) -> Iterator[ast.expr]:
    """What is assigned to `target` in a scope, and not in one inside."""
    for child in ast.iter_child_nodes(scope):
        if isinstance(child, ast.Assign) and target in map(ast.unparse, child.targets):
            yield child.value
        if not isinstance(child, _SCOPES):
            yield from _assigned(child, target)


def _is_module(text: str, around: tuple[ast.AST, ...], modules: set[str]) -> bool:
    classes = [scope for scope in around if isinstance(scope, ast.ClassDef)]
    if text == "self":
        return bool(classes) and classes[0].name in modules
    if text.startswith("self."):
        methods = (item for scope in classes[:1] for item in scope.body)
        return any(_makes_module(value, modules) for method in methods for value in _assigned(method, text))
    for scope in around:
        taken = scope.args if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef)) else None
        if taken is not None and text in {item.arg for item in (*taken.posonlyargs, *taken.args, *taken.kwonlyargs)}:
            return False
        values = list(_assigned(scope, text)) if not isinstance(scope, ast.ClassDef) else []
        if values:
            return any(_makes_module(value, modules) for value in values)
    return False


def _makes_module(value: ast.expr, modules: set[str]) -> bool:
    """Whether it is a call of a class of the file, or of torch.nn, that is a module."""
    if not isinstance(value, ast.Call):
        return False
    name = ast.unparse(value.func)
    known = getattr(nn, name.removeprefix("torch.").removeprefix("nn."), None) if "nn." in name else None
    return name in modules or (isinstance(known, type) and issubclass(known, nn.Module))


@rule("FX504")
def whole_module_saved(evidence: Evidence) -> Iterator[Found]:
    """A whole module saved in place of its state.

    The file holds the names of classes and files: it breaks when either moves, and loading it can run any code.

    Bad:
        torch.save(model, "model.pt")

    Good:
        torch.save(model.state_dict(), "model.pt")

    Fix: save `state_dict()`.
    """
    for path in evidence.files:
        tree = code.syntax(path)
        modules = {node.name for node in code.modules_in(path)}
        for call, around in _saves(tree, (tree,)) if tree is not None else ():
            text = ast.unparse(call.args[0])
            if _is_module(text, around, modules):
                yield Found(f"'{text}' is saved as a whole", code.at(path, call))
