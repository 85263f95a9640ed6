"""FX301: an epsilon that is zero in float16."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from fxopt.findings import Place
from passes.audit.evidence import Evidence, code
from passes.audit.evidence.forward import Step
from passes.audit.evidence.gains import LAYERS
from passes.audit.evidence.trail import DANGEROUS, divisor, epsilon, through
from passes.audit.rule import Found, rule

_PRODUCTS = (*LAYERS, "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention")


def _follows_type(place: Place) -> bool:
    """Whether the number is computed there, or for a variable there, from the type of a tensor: it fits float16 too."""
    statements = code.parts(ast.stmt, code.syntax(place.path))
    around = [node for node in statements if node.lineno <= place.line <= code.end(node)[0]]
    functions = [node for node in around if isinstance(node, ast.FunctionDef)]
    read = {node.id for node in code.parts(ast.Name, *around[-1:])}
    computed = code.parts(ast.Assign, *functions[-1:])
    named = [node for node in computed if read.intersection(map(ast.unparse, node.targets))]
    calls = code.parts(ast.Call, *around[-1:], *named)
    asked = [call.args[0] for call in calls if ast.unparse(call.func).endswith("finfo") and call.args]
    return any(not ast.unparse(kind).startswith("torch.") for kind in asked)


def _casts(step: Step) -> bool | None:
    """Whether a step casts to a wide type, or to another; None where it casts to none."""
    if step.name in ("float", "double"):
        return True
    if step.name not in ("to", "type", "type_as", "half", "bfloat16"):
        return None
    return bool({torch.float32, torch.float64}.intersection((*_dtypes(step.args), *_dtypes(step.kwargs.values()))))


def _dtypes(values: Iterable[Any]) -> list[torch.dtype]:
    return [value for value in values if isinstance(value, torch.dtype)]


def _is_wide(step: Step, made: dict[int, Step], wide: dict[int, bool]) -> bool:
    """Whether what a step is given was cast on purpose, with no layer in between."""
    waiting, seen = [step], set()
    while waiting:
        for value in waiting.pop().inputs:
            if wide.get(value.number):
                return True
            maker = made.get(value.number)
            if maker is not None and value.number not in wide and value.number not in seen:
                seen.add(value.number)
                waiting += [] if maker.name in _PRODUCTS else [maker]
    return False


@rule("FX301", once_a_line=True)
def epsilon_underflows(evidence: Evidence) -> Iterator[Found]:
    """An epsilon that is zero in float16.

    Below 6e-8 a number rounds to zero in float16: the guard against a division by zero is gone. One that is computed
    from the type of a tensor, `torch.finfo(x.dtype).tiny`, is another one there, and what is cast to float32 first
    keeps it.

    Bad:
        x / (x.norm(dim=-1, keepdim=True) + 1e-8)

    Good:
        x / (x.norm(dim=-1, keepdim=True) + 1e-5)

    Fix: use 1e-5, or compute this part in float32.
    """
    wide: dict[int, bool] = {}
    for step, made in evidence.forward.made():
        cast = _casts(step)
        if cast is not None:
            wide |= dict.fromkeys(step.outputs, cast)
        operand = divisor(step) if step.name in DANGEROUS else None
        behind = made.get(operand.number) if operand is not None else None
        guard = next((each for each in through(behind, made) if epsilon(each)), None)
        if guard is None or guard.place is None or epsilon(guard) >= 2.9e-8:
            continue
        if not _follows_type(guard.place) and not _is_wide(guard, made, wide):
            message = f"{epsilon(guard):g} is 0 in float16, and '{step.name.strip('_')}' relies on it"
            yield Found(message, guard.place, step.module)
