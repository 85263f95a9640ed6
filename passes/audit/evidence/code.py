"""The text of a user's classes: where an attribute is assigned, and which functions a forward runs."""

from __future__ import annotations

import ast
import builtins
import functools
import inspect
import linecache
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from fxopt.findings import Fix, Place

_TORCH = str(Path(torch.__file__).parent) + os.sep
_STANDARD = sysconfig.get_paths()["stdlib"] + os.sep
_FXOPT = str(Path(inspect.getfile(Place)).parents[1]) + os.sep
_AUDIT = str(Path(__file__).parents[1]) + os.sep

N = TypeVar("N", bound=ast.AST)


@functools.cache
def is_users_file(path: str) -> bool:
    """Whether a file belongs neither to torch, Python, fxopt nor to this pass."""
    if path.startswith((_TORCH, _FXOPT, _AUDIT, "<")):
        return False
    return not path.startswith(_STANDARD) or is_installed(path)


def is_installed(path: str) -> bool:
    """Whether a file is of an installed package, and so not the user's to edit."""
    return "-packages" in path


def is_users(kind: type) -> bool:
    """Whether the source of a class is there, and is not torch's own."""
    found = class_node(kind)
    return found is not None and is_users_file(found[0])


@dataclass(frozen=True)
class Body:
    """A function that runs in the forward of a module.

    Attributes:
        node: its syntax.
        path: of its file.
        names: the globals of its file.
        module: qualified name of a module that runs it.
        kind: class of that module.
        is_method: whether its first argument is that module.
    """

    node: ast.FunctionDef
    path: str
    names: dict[str, Any]
    module: str
    kind: type[nn.Module]
    is_method: bool = True

    @property
    def arguments(self) -> list[ast.arg]:
        """What it is given by position, besides the module."""
        return self.node.args.args[self.is_method :]

    def resolve(self, node: ast.expr) -> Any:
        """What a dotted global name means; None where it is none."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.resolve(node.value)
            return getattr(owner, node.attr, None) if owner is not None else None
        return None

    def calls(self) -> list[ast.Call]:
        """All calls in it."""
        return parts(ast.Call, self.node)


@functools.cache
def syntax(path: str) -> ast.Module | None:
    """The syntax of a file; None where it can't be read."""
    try:
        return ast.parse(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, SyntaxError, ValueError):
        return None


def parts(kind: type[N], *around: ast.AST | None) -> list[N]:
    """All pieces of a kind in pieces of syntax, these included."""
    return [node for each in around if each is not None for node in ast.walk(each) if isinstance(node, kind)]


def start(node: ast.expr | ast.stmt) -> tuple[int, int]:
    """Line and column of its first character, in bytes."""
    return node.lineno, node.col_offset


def end(node: ast.expr | ast.stmt) -> tuple[int, int]:
    """Line and column behind its last character, in bytes."""
    return node.end_lineno or node.lineno, node.end_col_offset or 0


def class_node(kind: type) -> tuple[str, ast.ClassDef] | None:
    """File and syntax of a class."""
    key: Any = kind
    return _class_node(key)


@functools.cache
def _class_node(kind: Any) -> tuple[str, ast.ClassDef] | None:
    try:
        path = inspect.getsourcefile(kind)
    except (TypeError, OSError):  # a class of no file, as those of a notebook
        return None
    tree = syntax(path) if path else None
    if path is None or tree is None:
        return None
    found: list[ast.AST] = [tree]
    for name in kind.__qualname__.replace(".<locals>", "").split("."):
        inside = [node for outer in found for node in ast.walk(outer) if node is not outer]
        found = [node for node in inside if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name]
    classes = [node for node in found if isinstance(node, ast.ClassDef)]
    lines = set(_methods(kind, path))
    holding = [node for node in classes if any(node.lineno <= line <= (node.end_lineno or 0) for line in lines)]
    # Of several of one name, the one that has the methods; of those around each other, the inner one.
    best = max(holding or classes, key=lambda node: node.lineno, default=None)
    return (str(Path(path).resolve()), best) if best is not None else None


def _methods(kind: type, path: str) -> Iterator[int]:
    """The lines at which the functions of a class begin."""
    for value in vars(kind).values():
        function = inspect.unwrap(value) if callable(value) else None
        if inspect.isfunction(function) and function.__code__.co_filename == path:
            yield function.__code__.co_firstlineno


def bases(kind: type) -> Iterator[tuple[type, str, ast.ClassDef]]:
    """The class and what it inherits from, in the order of lookup, as far as it is the user's."""
    for base in kind.__mro__:
        found = class_node(base)
        if found is not None and is_users_file(found[0]):
            yield base, *found


def methods(kind: type) -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions in `bases`, each with its file; `__init__` first of its class."""
    for _, path, node in bases(kind):
        functions = [item for item in node.body if isinstance(item, ast.FunctionDef)]
        yield from ((path, item) for item in sorted(functions, key=lambda item: item.name != "__init__"))


def modules_in(path: str) -> list[ast.ClassDef]:
    """The classes of a file that are modules, by what they say of their bases."""
    classes, found = parts(ast.ClassDef, syntax(path)), set[str]()
    for _ in classes:
        for node in classes:
            if {"Module", *found}.intersection(ast.unparse(base).rpartition(".")[2] for base in node.bases):
                found.add(node.name)
    return [node for node in classes if node.name in found]


def at(path: str, node: ast.expr | ast.stmt, note: str = "") -> Place:
    """The place of a piece of syntax."""
    end = column(path, node.lineno, node.end_col_offset or 0) if node.end_lineno == node.lineno else 0
    return Place(path, node.lineno, column(path, node.lineno, node.col_offset), end, note)


def column(path: str, line: int, offset: int) -> int:
    """The column of a character, which Python gives as the bytes in front of it."""
    text = linecache.getline(path, line)
    return offset + 1 if text.isascii() else len(text.encode()[:offset].decode(errors="ignore")) + 1


def assignments(kind: type, attribute: str) -> Iterator[tuple[str, ast.stmt]]:
    """Where `self.attribute` is set, in the class itself or what it inherits from; `__init__` first."""
    for path, function in methods(kind):
        yield from ((path, each) for each in parts(ast.stmt, function) if attribute in _sets(each))


def assigned(kind: type, attribute: str) -> Place | None:
    """The first place of `assignments`; the class itself where there is none."""
    for path, statement in assignments(kind, attribute):
        return at(path, statement)
    return declared(kind)


def declared(kind: type) -> Place | None:
    """The line of the class statement."""
    found = class_node(kind)
    return Place(found[0], found[1].lineno, found[1].col_offset + 1) if found else None


def _sets(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.Assign):
        targets: list[ast.expr] = list(statement.targets)
    elif isinstance(statement, (ast.AnnAssign, ast.AugAssign)):
        targets = [statement.target]
    elif isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        return _registers(statement.value)
    else:
        return set()
    flat = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return {name for target in flat if (name := self_attribute(target))}


def kept(body: Body) -> Iterator[int]:
    """The lines whose results are kept on `self` or told, by themselves or by a statement that reads their variable."""
    statements = parts(ast.stmt, body.node)
    keeping = [statement for statement in statements if _sets(statement) or _tells(statement, body)]
    read = {node.id for node in parts(ast.Name, *keeping)}
    for statement in statements:
        targets = statement.targets if isinstance(statement, ast.Assign) else []
        if statement in keeping or any(isinstance(target, ast.Name) and target.id in read for target in targets):
            yield from range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)


def _tells(statement: ast.stmt, body: Body) -> bool:
    """Whether a statement is a call of something global that is not torch's: `print(x)`, `logger.info(x)`."""
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        return False
    function = body.resolve(statement.value.func) or vars(builtins).get(ast.unparse(statement.value.func))
    path = getattr(function, "__module__", None) or getattr(getattr(function, "__self__", None), "__module__", None)
    return function is not None and not isinstance(function, nn.Module) and not str(path).startswith("torch")


def _registers(call: ast.Call) -> set[str]:
    function = call.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    if name in ("register_buffer", "register_parameter", "add_module", "register_module") and call.args:
        return {str(call.args[0].value)} if isinstance(call.args[0], ast.Constant) else set()
    if name in ("setattr", "__setattr__"):
        return {str(arg.value) for arg in call.args if isinstance(arg, ast.Constant)}
    if name in ("append", "extend", "insert", "update") and isinstance(function, ast.Attribute):
        return {self_attribute(function.value)} - {""}
    return set()


def with_value(path: str, statement: ast.Assign, change: Callable[[str], str], what: str) -> Fix:
    """The edit that puts something else in the place of an assignment.

    Args:
        path: of the file.
        statement: to one target.
        change: is given the text of the value, and returns the new statement.
        what: the edit does, in a few words.
    """
    lines = Path(path).read_text(encoding="utf-8").split("\n")  # as Python counts them, form feeds or not
    first, last = statement.lineno, statement.end_lineno or statement.lineno
    target = statement.targets[0]
    inside = lines[first - 1 : last]
    inside[-1] = inside[-1].encode()[: statement.end_col_offset].decode()
    inside[0] = inside[0].encode()[target.end_col_offset :].decode()
    value = "\n".join(inside).partition("=")[2].strip()
    start, end = column(path, first, statement.col_offset), column(path, last, statement.end_col_offset or 0)
    return Fix(path, first, start, last, end, change(value), what)


def imported(path: str) -> dict[str, str]:
    """What the imports of a file mean: `{"nn": "torch.nn"}`."""
    found: dict[str, str] = {}
    tree = syntax(path)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, ast.Import):
            found |= {item.asname or item.name: item.name for item in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {item.asname or item.name: f"{node.module}.{item.name}" for item in node.names}
    return found


def self_attribute(node: ast.AST) -> str:
    """`name` for `self.name`, and for `self.name[...]`."""
    if isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
        return node.attr
    return ""


def forward_bodies(kind: type[nn.Module], module: str) -> Iterator[Body]:
    """`forward`, and the methods of `self` and of `super()` that it calls, wherever in the class tree they are."""
    tree = list(bases(kind))
    waiting: list[tuple[str, int]] = [("forward", 0)]
    seen = set(waiting)
    while waiting:
        name, first = waiting.pop()
        position = next((i for i in range(first, len(tree)) if name in vars(tree[i][0])), len(tree))
        for base, path, node in tree[position : position + 1]:
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == name:
                    yield Body(item, path, vars(sys.modules[base.__module__]), module, kind)
                    calls = [part.func for part in parts(ast.Call, item)]
                    called = {(self_attribute(function), 0) for function in calls}
                    called |= {(_super_attribute(function), position + 1) for function in calls}
                    new = {(method, start) for method, start in called - seen if method}
                    waiting += sorted(new)
                    seen |= new


def called_functions(body: Body) -> Iterator[Body]:
    """The functions of the user's own files that a function calls by their names."""
    for call in body.calls():
        named = body.resolve(call.func)
        function = inspect.unwrap(named) if callable(named) else None
        if not inspect.isfunction(function):
            continue
        path, line = function.__code__.co_filename, function.__code__.co_firstlineno
        tree = syntax(path) if is_users_file(path) and not is_installed(path) else None
        for item in tree.body if tree else ():
            if isinstance(item, ast.FunctionDef) and line in (
                item.lineno,
                *(each.lineno for each in item.decorator_list),
            ):
                resolved = str(Path(path).resolve())
                yield Body(item, resolved, function.__globals__, body.module, body.kind, is_method=False)


def _super_attribute(node: ast.AST) -> str:
    """`name` for `super().name`."""
    if isinstance(node, ast.Attribute) and ast.unparse(node.value).startswith("super("):
        return node.attr
    return ""
