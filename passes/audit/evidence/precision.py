"""A shadow run: what float16 and bfloat16 make of each operator's result, beside float64."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.findings import Place, Subject
from passes.audit.evidence.driver import copied, floating, kept, telling_modules
from passes.audit.evidence.places import running
from passes.audit.evidence.twins import Result, Slip, Twins

# Relative errors far beyond the rounding of one result: 200 units in the last place, and 77.
_BOUNDS = {torch.float16: 0.1, torch.bfloat16: 0.3}
_LIMIT = 500_000_000


@dataclass(frozen=True)
class Loss:
    """The first operator at which a precision is lost in one way.

    Attributes:
        dtype: the precision.
        slip: how, and how much.
        operator: its name.
        place: the user's line.
        module: qualified name.
        reaches: whether the outputs of the model are off by more than the bound too.
    """

    dtype: torch.dtype
    slip: Slip
    operator: str
    place: Place | None
    module: str
    reaches: bool = False


class _Shadow(TorchDispatchMode):
    def __init__(self, stack: list[str]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack = stack
        self.twins = [Twins(dtype, bound) for dtype, bound in _BOUNDS.items()]
        self.losses: dict[tuple[torch.dtype, str], Loss] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        both = (args, kwargs or {})
        given = [leaf for leaf in pytree.tree_leaves(both) if _is_floating(leaf)]
        # An operator that writes into an operand changes what the twin has to be made of.
        known = [{id(leaf): twins.of(leaf) for leaf in given} for twins in self.twins] if given else []
        result = _computed(func, both)
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if not given or not any(map(_is_floating, made)):
            return result
        view = any(item.alias_info is not None for item in func._schema.returns)
        written = {id(leaf) for leaf in given}
        results = [Result(x, not view or id(x) in written) if _is_floating(x) else None for x in made]
        for twins, operands in zip(self.twins, known, strict=True):
            for slip in twins.follow(func, both, operands, results):
                self._note(func, twins.dtype, slip)
        return result

    def _note(self, func: Any, dtype: torch.dtype, slip: Slip) -> None:
        if (dtype, slip.kind) not in self.losses:
            operator = func.name().partition(".")[0].removeprefix("aten::").strip("_")
            path = self.stack[-1] if self.stack else ""
            self.losses[dtype, slip.kind] = Loss(dtype, slip, operator, running(), path)


def run_in_half(subject: Subject) -> list[Loss]:
    """The first loss of each kind in each precision.

    Raises:
        MemoryError: the model is too large to be held in float64 too.
    """
    assert subject.inputs is not None and subject.module is not None
    size = sum(parameter.numel() for parameter in subject.module.parameters())
    if size > _LIMIT:
        raise MemoryError(f"{size:,} parameters are too many to hold them in float64")
    exact = copied(subject, training=False).double()
    inputs = subject.inputs.map(lambda x: x.detach().double() if x.is_floating_point() else x.detach().clone())
    stack: list[str] = []
    shadow = _Shadow(stack)
    with kept(), torch.no_grad():
        torch.set_default_dtype(torch.float64)  # what the forward makes has the type of the model
        with telling_modules(exact, stack), shadow:
            outputs = floating(exact(*inputs.args, **dict(inputs.kwargs)))
    reached = {twins.dtype for twins in shadow.twins for tensor in outputs if twins.of(tensor).error > twins.bound}
    return [
        Loss(loss.dtype, loss.slip, loss.operator, loss.place, loss.module, loss.dtype in reached)
        for loss in shadow.losses.values()
    ]


def _computed(func: Any, both: Any) -> Any:
    """What an operator gives; of operands in one type where it refuses several, or float64.

    In a model of one type `x.float()` changes nothing, and some operators know fewer types.
    """
    try:
        return func(*both[0], **both[1])
    except RuntimeError:
        if func._schema.is_mutable:
            raise
        for dtype in (torch.float64, torch.float32):
            args, kwargs = pytree.tree_map_only(torch.Tensor, functools.partial(_in, dtype), both)
            with contextlib.suppress(RuntimeError):
                return pytree.tree_map_only(torch.Tensor, functools.partial(_in, torch.float64), func(*args, **kwargs))
        raise


def _in(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of numbers in a type; integers stay."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
