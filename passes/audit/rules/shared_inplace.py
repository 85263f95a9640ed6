"""FX107: an in-place activation on a tensor that is read again."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence

from torch import nn

from fxopt.findings import Precision, Severity
from passes.audit.evidence import Evidence, code
from passes.audit.rule import Found, rule

_ASKED = set("shape size dim ndim numel device dtype stride layout is_cuda requires_grad".split())
_ASKED |= {"new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"}
_ASKS = {"len", "isinstance", "type", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"}
_STATEMENTS = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)


def _writes_into(call: ast.Call, module: nn.Module | None, body: code.Body) -> str:
    """The name of the variable that the call writes into, or ""."""
    if not call.args or not isinstance(call.args[0], ast.Name):
        return ""
    called = getattr(module, code.self_attribute(call.func) or "forward", None)
    if isinstance(called, nn.Module):
        return call.args[0].id if _is_in_place(called) else ""
    flags = [item.value for item in call.keywords if item.arg == "inplace"]
    from_torch = str(getattr(body.resolve(call.func), "__module__", "")).startswith("torch")
    in_place = from_torch and any(isinstance(flag, ast.Constant) and flag.value is True for flag in flags)
    return call.args[0].id if in_place else ""


def _is_in_place(module: nn.Module) -> bool:
    if isinstance(module, nn.Sequential):
        parts = [child for child in module if not isinstance(child, nn.Identity)]
        return bool(parts) and _is_in_place(parts[0])
    return getattr(module, "inplace", False) is True and not list(module.children())


def _read_after(function: ast.FunctionDef, statement: ast.stmt, call: ast.Call, name: str) -> ast.Name | None:
    """Where `name` is read after the call, before it is bound anew."""
    asked = set(_asked(function))
    names = [n for n in code.parts(ast.Name, function) if n.id == name and n not in asked]
    later = [n for n in names if code.start(n) >= code.end(call) and not _exclude(function, call, n)]
    rebinds = any(node in names and _binds(node) for node in code.parts(ast.Name, statement))
    node = min(later, key=code.start, default=None)
    if node is None or _binds(node):
        return None
    outside = code.start(node) >= code.end(statement)
    return None if outside and (rebinds or isinstance(statement, ast.Return)) else node


def _other_names(function: ast.FunctionDef, statement: ast.stmt, call: ast.Call, name: str) -> Iterator[str]:
    """Further variables of the same tensor: `shortcut = x`, with neither bound anew before the call."""
    start = code.start(statement)
    binds = [node for node in code.parts(ast.Name, function) if _binds(node)]
    for node in code.parts(ast.Assign, function):
        end, value = code.end(node), node.value
        if not isinstance(value, ast.Name) or end > start or _exclude(function, value, call):
            continue
        for pair in ((target.id, value.id) for target in node.targets if isinstance(target, ast.Name)):
            anew = any(each.id in pair and end <= code.start(each) < start for each in binds)
            if name in pair and not anew:
                yield from {*pair} - {name}


def _asked(function: ast.FunctionDef) -> Iterator[ast.expr]:
    """What is asked for its shape or type only."""
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr in _ASKED:
            yield node.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in _ASKS:
            yield from node.args[:1]


def _exclude(function: ast.FunctionDef, first: ast.expr, second: ast.expr) -> bool:
    """Whether no run gets to both: they are in two arms of a branch, or the first is in an arm that leaves."""
    branches: list[ast.If | ast.IfExp] = [*code.parts(ast.If, function), *code.parts(ast.IfExp, function)]
    for branch in branches:
        arms = [arm if isinstance(arm, list) else [arm] for arm in (branch.body, branch.orelse)]
        for arm, other in (arms, arms[::-1]):
            leaves = bool(arm) and isinstance(arm[-1], (ast.Return, ast.Raise)) and not _holds(arm, second)
            if _holds(arm, first) and (leaves or _holds(other, second)):
                return True
    return False


def _holds(arm: Sequence[ast.AST], part: ast.expr) -> bool:
    return any(node is part for each in arm for node in ast.walk(each))


def _binds(node: ast.Name) -> bool:
    return not isinstance(node.ctx, ast.Load)


@rule("FX107", Severity.ERROR, Precision.MEDIUM)
def shared_inplace(evidence: Evidence) -> Iterator[Found]:
    """An in-place activation on a tensor that is read again.

    The other branch reads what the activation has written, not what its author meant.

    Bad:
        self.act = nn.ReLU(inplace=True)
        ...
        return self.left(self.act(x)) + self.right(x)

    Good:
        self.act = nn.ReLU()

    Fix: drop `inplace=True`, or read the result in both branches.
    """
    for body in evidence.bodies:
        module = evidence.module_at(body.module)
        for statement in (node for node in code.parts(ast.stmt, body.node) if isinstance(node, _STATEMENTS)):
            for call in code.parts(ast.Call, statement):
                name = _writes_into(call, module, body)
                names = [name, *_other_names(body.node, statement, call, name)] if name else []
                readers = (_read_after(body.node, statement, call, each) for each in names)
                reader = next((each for each in readers if each is not None), None)
                if reader is not None:
                    related = (code.at(body.path, reader, "it is read again here"),)
                    same = "which" if reader.id == name else f"which is '{reader.id}' too, and"
                    message = f"'{ast.unparse(call)}' writes into '{name}', {same} is read again afterwards"
                    yield Found(message, code.at(body.path, call), body.module, related)
