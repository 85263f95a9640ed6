"""FX504: a whole module saved in place of its state."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from fxopt.findings import Finding
from passes.audit.evidence import Evidence, code
from passes.audit.rule import Rule


def _saves(tree: ast.Module) -> Iterator[tuple[bool, ast.Call]]:
    """Calls of `torch.save`, and whether each is inside a class."""
    inside = {id(n) for c in ast.walk(tree) if isinstance(c, ast.ClassDef) for n in ast.walk(c)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.save" and node.args:
            yield id(node) in inside, node


def _modules(tree: ast.Module) -> set[str]:
    """Variables that are set to an object of a class of the file, or of torch.nn."""
    classes = {n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            name = ast.unparse(node.value.func)
            if name in classes or name.startswith("nn."):
                found |= {ast.unparse(target) for target in node.targets}
    return found


class WholeModuleSaved(Rule):
    """A whole module saved in place of its state.

    The file holds the names of classes and files: it breaks when either moves, and loading it can run any code.

    Bad:
        torch.save(model, "model.pt")

    Good:
        torch.save(model.state_dict(), "model.pt")

    Fix: save `state_dict()`.
    """

    id = "FX504"
    name = "whole-module-saved"
    group = "deployment"

    def check(self, evidence: Evidence) -> Iterator[Finding]:
        """All places that have the fault."""
        for path in evidence.files:
            tree = code.syntax(path)
            for inside, call in _saves(tree) if tree is not None else ():
                text = ast.unparse(call.args[0])
                if tree is not None and (text == "self" if inside else text in _modules(tree)):
                    yield self.found(f"'{text}' is saved as a whole", code.at(path, call))
