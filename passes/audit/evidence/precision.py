"""A shadow run: what float16 and bfloat16 make of every operator's result, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.findings import Place, Subject
from passes.audit.evidence.driver import copied, kept, telling_modules, tensors
from passes.audit.evidence.places import running

_BOUND = {torch.float16: 0.1, torch.bfloat16: 0.5}


@dataclass(frozen=True)
class Loss:
    """The first operator at which a precision is lost.

    Attributes:
        dtype: the precision.
        kind: overflow, underflow or error.
        operator: its name.
        value: the largest magnitude, or the relative error.
        place: the user's line.
        module: qualified name.
    """

    dtype: torch.dtype
    kind: str
    operator: str
    value: float
    place: Place | None
    module: str


class _Shadow(TorchDispatchMode):
    """Looks at each result of a float64 run: does it fit, once rounded?

    Only the ranges and the rounding of the results themselves are looked at, so one run serves all precisions.
    """

    def __init__(self, stack: list[str]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack = stack
        self.losses: dict[torch.dtype, Loss] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if len(self.losses) == len(_BOUND):
            return result
        made = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor) and x.is_floating_point()]
        for tensor in made[:1]:
            if tensor.numel() and tensor.layout is torch.strided:
                self._look(func, tensor, args)
        return result

    def _look(self, func: Any, tensor: torch.Tensor, args: Any) -> None:
        low, high = (float(value) for value in tensor.detach().aminmax())
        largest = max(abs(low), abs(high))
        if largest != largest or largest == float("inf"):
            return
        scalars = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, (float, int))]
        if any(abs(value) > 1e30 for value in scalars):  # a mask, which another dtype would have of its own
            return
        for dtype in _BOUND:
            limits = torch.finfo(dtype)
            if dtype in self.losses:
                continue
            if largest > limits.max:
                self._lose(dtype, "overflow", func, largest)
            elif 0 < largest < limits.smallest_normal * limits.eps:
                self._lose(dtype, "underflow", func, largest)

    def _lose(self, dtype: torch.dtype, kind: str, func: Any, value: float) -> None:
        if value >= 1e30:
            return
        operator = func.name().partition(".")[0].removeprefix("aten::")
        path = self.stack[-1] if self.stack else ""
        self.losses[dtype] = Loss(dtype, kind, operator, value, running(), path)


def run_in_half(subject: Subject) -> list[Loss]:
    """The first loss of each precision; the float64 run goes on behind it."""
    assert subject.inputs is not None
    exact = _doubled(copied(subject, training=False))
    losses = []
    with kept(), torch.no_grad():
        stack: list[str] = []
        inputs = subject.inputs.map(lambda x: x.detach().double() if x.is_floating_point() else x.detach().clone())
        shadow = _Shadow(stack)
        with telling_modules(exact, stack), shadow:
            expected = tensors(exact(*inputs.args, **dict(inputs.kwargs)))
        losses = list(shadow.losses.values())
        if torch.bfloat16 not in shadow.losses:
            error = _error_in(torch.bfloat16, subject, expected)
            if error is not None and error > _BOUND[torch.bfloat16]:
                losses.append(Loss(torch.bfloat16, "error", "the output", error, None, ""))
    return losses


def _doubled(module: nn.Module) -> nn.Module:
    torch.set_default_dtype(torch.float32)
    return module.double()


def _error_in(dtype: torch.dtype, subject: Subject, expected: list[torch.Tensor]) -> float | None:
    """The largest relative error of the outputs; None where the model does not run in that precision."""
    assert subject.inputs is not None
    low = copied(subject, training=False).to(dtype)
    inputs = subject.inputs.map(lambda x: x.detach().to(dtype) if x.is_floating_point() else x.detach().clone())
    try:
        actual = tensors(low(*inputs.args, **dict(inputs.kwargs)))
    except Exception:  # many models say that they can't
        return None
    worst = 0.0
    for one, other in zip(actual, expected, strict=False):
        if one.is_floating_point() and one.shape == other.shape and one.numel():
            scale = float(other.double().norm()) or 1.0
            worst = max(worst, float((one.double() - other.double()).norm()) / scale)
    return worst
