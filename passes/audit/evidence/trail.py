"""Where values come from: the guards in front of an operator, and the line that made a submodule."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from torch import nn

from fxopt.findings import Place
from passes.audit.evidence import code
from passes.audit.evidence.forward import Activation, Step, Value

if TYPE_CHECKING:
    from passes.audit.evidence import Evidence

ROOTS = ("sqrt", "sqrt_", "rsqrt", "log", "log2", "log10", "pow", "__rdiv__", "__rtruediv__", "reciprocal")
DIVISIONS = ("div", "div_", "true_divide")
DANGEROUS = (*ROOTS, *DIVISIONS)
_VIEWS = {"unsqueeze", "squeeze", "view", "reshape", "expand", "expand_as", "to", "float", "transpose", "contiguous"}
_VIEWS |= {"__getitem__", "permute", "type_as", "mT", "sqrt"}
# What can well be zero for a harmless input. A plain sum often is of weights, or of a softmax.
_NORMS = {"norm", "linalg_norm", "vector_norm", "linalg_vector_norm"}
_SPREADS = {*_NORMS, "var", "std", "abs", "relu", "sub"}
_SHARES = {"softmax", "sigmoid", "relu", "abs", "norm"}
_CLAMPS = ("clamp", "clamp_min", "clip", "clamp_", "clamp_min_")


def divisor(step: Step) -> Value | None:
    """The operand whose zero is dangerous."""
    if step.name in DIVISIONS:
        other = step.args[1] if len(step.args) > 1 else step.kwargs.get("other")
        return other if isinstance(other, Value) and other.floating else None
    first = step.args[0] if step.args else None
    return first if isinstance(first, Value) and first.floating else None


def source(operand: Value, made: dict[int, Step], name: str) -> str:
    """The name of the operator behind `operand` where its result can be zero and nothing guards it; else ""."""
    risky = _SHARES if name.startswith("log") else _SPREADS if name not in ("sqrt", "sqrt_") else {"var"}
    risky = risky | {"square_sum"} if "sqrt" in name else risky
    for step in through(made.get(operand.number), made):
        if epsilon(step):
            return ""
        if step.name == "sqrt" and "sqrt" not in name:
            continue
        if step.name in risky:
            return step.name
        if step.name == "sum" and "square_sum" in risky and step.inputs:
            inner = made.get(step.inputs[0].number)
            if inner is not None and (inner.name == "square" or (inner.name == "pow" and 2 in inner.args)):
                return "the sum of squares"
        if "sqrt" in name and step.name in _CLAMPS and _low(step) == 0:
            return step.name
        if step.name == "__rsub__" and name.startswith("log") and 1 in step.args:
            return "".join(f"1 - {each}" for each in _behind(step, made) & {"softmax", "sigmoid"})
        if step.name == "mul" and name in DIVISIONS:
            return next(iter(sorted(_behind(step, made) & _NORMS)), "")
    return ""


def _behind(step: Step, made: dict[int, Step]) -> set[str]:
    """The names of the steps in front of a step, past views and casts; none where one of them is guarded."""
    found = [each for value in step.inputs for each in through(made.get(value.number), made)]
    return set() if any(map(epsilon, found)) else {each.name for each in found}


def through(step: Step | None, made: dict[int, Step]) -> Iterator[Step]:
    """A step, and what is in front of it as long as only views and casts lie between."""
    for _ in range(8):
        if step is None:
            return
        yield step
        if step.name not in _VIEWS or not step.inputs:
            return
        step = made.get(step.inputs[0].number)


def epsilon(step: Step) -> float:
    """The small positive number that a step adds, or clamps to; 0 where it does neither."""
    low = _low(step) if step.name in ("add", "add_", *_CLAMPS) else None
    return float(low) if isinstance(low, (int, float)) and low > 0 else 0.0


def _low(step: Step) -> Any:
    """What a step adds, or clamps to from below."""
    return step.kwargs.get("min", step.args[1] if len(step.args) > 1 else None)


def called(evidence: Evidence) -> dict[tuple[str, Place | None], list[Activation]]:
    """Calls of activations by the module and the line that makes them: the module's own, where torch wrote it."""
    found: dict[tuple[str, Place | None], list[Activation]] = {}
    for each in evidence.forward.activations:
        module = evidence.module_at(each.module)
        by_module = module is not None and not code.is_users(type(module))
        place = place_of(evidence, each.module, "") if by_module else each.place
        found.setdefault((each.module, place), []).append(each)
    return found


def wholes(chosen: set[str], parameters: Iterable[str]) -> dict[str, str]:
    """The modules of which all parameters are chosen, each with the first of them.

    Of modules inside each other it is the outer one. A parameter whose module has others that are not chosen stands
    for itself.
    """
    every = list(parameters)
    left = {around for name in every if name not in chosen for around in _around(name)}
    found: dict[str, str] = {}
    for name in every:
        if name in chosen:
            found.setdefault(next((around for around in _around(name) if around not in left), name), name)
    return found


def where(evidence: Evidence, whole: str, name: str) -> tuple[Place | None, str]:
    """The place of what `wholes` gave, and the module that it is or is in."""
    path, _, leaf = name.rpartition(".")
    return (place_of(evidence, path, leaf), path) if whole == name else (place_of(evidence, whole, ""), whole)


def _around(name: str) -> list[str]:
    """The names of the modules around a parameter, but for the root, from the outside in."""
    parts = name.split(".")[:-1]
    return [".".join(parts[: count + 1]) for count in range(len(parts))]


def place_of(evidence: Evidence, path: str, leaf: str) -> Place | None:
    """The user's line that made the module at `path`, or set its attribute `leaf` where it is the user's own."""
    module = evidence.module_at(path)
    if leaf and module is not None and code.is_users(type(module)) and any(code.assignments(type(module), leaf)):
        return code.assigned(type(module), leaf)
    for owner_path, owner in evidence.owner(path):
        if code.is_users(type(owner)):
            relative = path[len(owner_path) :].lstrip(".")
            return _made(type(owner), relative)
    return code.declared(type(module)) if module is not None and code.is_users(type(module)) else None


def init_place(evidence: Evidence, path: str) -> Place | None:
    """The call that initialises the weight of the module at `path`, in the text of its owner."""
    leaf = path.rpartition(".")[2]
    for _, owner in evidence.owner(path):
        for _, file, node in code.bases(type(owner)):
            for call in code.parts(ast.Call, node):
                given = [ast.unparse(argument) for argument in call.args]
                written = ast.unparse(call.func)
                if "init" in written and f"self.{leaf}.weight" in given:
                    return code.at(file, call)
                if written.startswith(f"self.{leaf}.weight."):
                    return code.at(file, call)
        if code.is_users(type(owner)):
            return None
    return None


def _made(kind: type[nn.Module], relative: str) -> Place | None:
    name, *inner = relative.split(".")
    for path, statement in code.assignments(kind, name):
        value = getattr(statement, "value", None)
        for index in inner:
            part = value.args if isinstance(value, ast.Call) else []
            if len(part) == 1 and isinstance(part[0], (ast.List, ast.Tuple)):
                part = part[0].elts
            counted = part[: int(index) + 1] if index.isdigit() and int(index) < len(part) else []
            if not counted or any(isinstance(each, ast.Starred) for each in counted):
                break
            value = counted[-1]
        else:
            return code.at(path, value if inner and value is not None else statement)
        return code.at(path, statement)
    return code.declared(kind)
