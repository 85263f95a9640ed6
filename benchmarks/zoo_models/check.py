"""Captures one model and compares it with the original."""

from __future__ import annotations

import copy
import dataclasses
import statistics
import time
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt.capture import Captured, capture
from fxopt.errors import GuardError
from fxopt.inputs import Inputs
from zoo_models.memory import begin_peak, peak, peak_of
from zoo_models.specimen import QuickInitialization, Specimen


def check(specimen: Specimen) -> dict[str, Any]:
    """Everything that the zoo's record says of one model.

    Its status is "exact", "differs", "failed" (capture or the captured module raises), or "not run" (it can't
    be built from the small config, or its own forward raises). Times are processor seconds of the one thread
    that it runs on, which other work on the machine does not add to. Peaks are those of the whole process,
    Python and torch included.
    """
    try:
        with QuickInitialization():
            module, inputs = specimen.build()
    except Exception as error:  # whatever a constructor raises
        return _not_run(error)
    example = inputs["example"]
    keys = list(module.state_dict())
    eager_bytes = peak_of(lambda: _run(module, example))
    arguments = copy.deepcopy(example)
    begin_peak()
    began = time.process_time()
    try:
        captured = capture(module, arguments)
    except Exception:  # the model's own or capture's
        try:
            _run(module, example)
        except Exception as error:
            return _not_run(error)
        raise
    seconds, capture_bytes = time.process_time() - began, peak()
    sizes = {"example": _compare(module, captured, example)}
    eager_seconds = _seconds(module, example)
    _run(captured.module, example)
    for name, other in inputs.items():
        if name != "example":
            sizes[name] = _compare(module, captured, other)
    wrong = [answer for answer in sizes.values() if answer.startswith(("differs", "raises"))]
    return {
        "status": "exact" if not wrong else ("differs" if wrong[0].startswith("differs") else "failed"),
        "error": wrong[0] if wrong else "",
        "sizes": sizes,
        "state_dict": list(captured.module.state_dict()) == keys,
        "parameters": sum(p.numel() for p in module.parameters()),
        "nodes": sum(len(graph.nodes) for graph in captured.module.graphs.values()),
        "coverage": dataclasses.asdict(captured.coverage),
        "opaque": [dataclasses.asdict(part) for part in captured.opaque],
        "guards": len(captured.guards),
        "constants": len(captured.constants),
        "notes": list(captured.notes),
        "eager_seconds": round(eager_seconds, 4),
        "capture_seconds": round(seconds, 4),
        "eager_peak_bytes": eager_bytes,
        "capture_peak_bytes": capture_bytes,
    }


def _not_run(error: Exception) -> dict[str, Any]:
    return {"status": "not run", "error": f"{type(error).__name__}: {error}"[:300]}


def _run(module: nn.Module, inputs: Inputs) -> Any:
    fresh = copy.deepcopy(inputs)
    torch.manual_seed(1)
    output = module(*fresh.args, **fresh.kwargs)
    # Two runs are compared, and what autograd keeps of both can be more than the machine has.
    return pytree.tree_map_only(torch.Tensor, lambda x: x.detach().requires_grad_(x.requires_grad), output), fresh


def _seconds(module: nn.Module, inputs: Inputs) -> float:
    """The median of three forwards; of one where that takes long."""
    taken: list[float] = []
    while len(taken) < 3 and sum(taken) < 1:
        fresh = copy.deepcopy(inputs)
        began = time.process_time()
        module(*fresh.args, **fresh.kwargs)
        taken.append(time.process_time() - began)
    return statistics.median(taken)


def _compare(module: nn.Module, captured: Captured, inputs: Inputs) -> str:
    try:
        expected = _run(module, inputs)
    except Exception as error:  # a size that the model does not take
        return f"not taken ({type(error).__name__})"
    try:
        actual = _run(captured.module, inputs)
    except GuardError as error:
        return f"guarded: {error}".split(", but it is")[0]
    except Exception as error:
        return f"raises {type(error).__name__}: {error}"[:300]
    difference = first_difference(expected, actual)
    return f"differs at {difference}" if difference else "exact"


def first_difference(expected: Any, actual: Any, where: str = "", seen: set[int] | None = None) -> str:
    """Where two structures are not the same in types, values and order; "" where they are."""
    seen = set() if seen is None else seen
    if id(expected) in seen:
        return ""
    seen.add(id(expected))
    if type(expected) is not type(actual):
        return f"{where or 'the output'}: {type(expected).__name__} became {type(actual).__name__}"
    if isinstance(expected, torch.Tensor):
        return "" if _equal(expected, actual) else f"{where or 'the output'}: {_distance(expected, actual)}"
    if isinstance(expected, dict):
        if list(expected) != list(actual):
            return f"{where}: keys {list(expected)} became {list(actual)}"
        pairs = [
            (f"{where}[{key!r}]", dict.__getitem__(expected, key), dict.__getitem__(actual, key)) for key in expected
        ]
    elif isinstance(expected, (list, tuple)):
        if len(expected) != len(actual):
            return f"{where}: length {len(expected)} became {len(actual)}"
        pairs = [(f"{where}[{i}]", a, b) for i, (a, b) in enumerate(zip(expected, actual, strict=True))]
    elif isinstance(expected, (int, float, str, bool, type(None))):
        return "" if expected == actual or expected != expected else f"{where}: {expected!r} became {actual!r}"
    elif hasattr(expected, "__dict__") and not callable(expected):
        return first_difference(vars(expected), vars(actual), where, seen)
    else:
        return ""
    return next((found for name, a, b in pairs if (found := first_difference(a, b, name, seen))), "")


def _equal(expected: torch.Tensor, actual: torch.Tensor) -> bool:
    if expected.dtype != actual.dtype or expected.shape != actual.shape or expected.layout != actual.layout:
        return False
    if expected.is_quantized:
        return torch.equal(expected.int_repr(), actual.int_repr())
    if expected.requires_grad != actual.requires_grad:
        return False
    return torch.equal(expected, actual) or bool(torch.isclose(expected, actual, 0, 0, equal_nan=True).all())


def _distance(expected: torch.Tensor, actual: torch.Tensor) -> str:
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return f"{tuple(expected.shape)} {expected.dtype} became {tuple(actual.shape)} {actual.dtype}"
    if expected.requires_grad != actual.requires_grad:
        return f"requires_grad {expected.requires_grad} became {actual.requires_grad}"
    return f"by {(expected.double() - actual.double()).abs().max().item():.2g}"
