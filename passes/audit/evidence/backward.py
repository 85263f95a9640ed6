"""The run in training: which parameters take part, and what gradient each gets."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxopt.findings import Place, Subject
from passes.audit.evidence.code import is_users_file
from passes.audit.evidence.driver import call, copied, floating, kept, random_state
from passes.audit.evidence.places import line_of

_FRAME = re.compile(r'File "([^"]+)", line (\d+), in')

_MORE = 6
"""At most so many runs more: what is dropped half of the time is dropped in all of them once in 128."""


@dataclass
class Backward:
    """What was seen.

    Attributes:
        used: names of the parameters that an operator read.
        norms: of the gradients, by parameter; None where there is no gradient.
        dead: parameters whose gradient stays zero.
        revived: those whose gradient is zero only because weights are.
        spoiled: the first operator whose gradient is NaN, as torch names it, and its place.
        written: buffers that the forward changed.
        random: whether the forward drew random numbers.
    """

    used: set[str] = field(default_factory=set)
    norms: dict[str, float | None] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)
    revived: set[str] = field(default_factory=set)
    spoiled: tuple[str, Place | None] | None = None
    written: set[str] = field(default_factory=set)
    random: bool = False


class _Readers(TorchDispatchMode):
    """Sees which tensors operators read."""

    def __init__(self, wanted: dict[int, str], used: set[str]):
        super().__init__()  # type: ignore[no-untyped-call]
        self.wanted, self.used = wanted, used

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A parameter that is only detached takes part all the same.
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and id(leaf) in self.wanted:
                self.used.add(self.wanted[id(leaf)])
        return func(*args, **(kwargs or {}))


def run_backward(subject: Subject) -> Backward | None:
    """One forward and backward in training, and more where chance may have left a part out.

    One more is without all-zero weights, where gradients are zero.
    """
    module = copied(subject, training=True)
    seen = Backward()
    buffers = {name: buffer.detach().clone() for name, buffer in module.named_buffers()}
    if not _differentiate(module, subject, seen):
        return None
    for name, buffer in module.named_buffers():
        # One that has another shape now is made anew as needed, like a table of positions.
        if name in buffers and buffer.shape == buffers[name].shape and not _same(buffer, buffers[name]):
            seen.written.add(name)
    seen.norms = _norms(module)
    for seed in range(1, _MORE + 1):
        missing = {name for name, norm in seen.norms.items() if not norm}  # as layers that are dropped at random are
        if not (seen.random and missing):
            break
        other = copied(subject, training=True)
        _differentiate(other, subject, seen, seed)
        seen.norms |= {name: norm for name, norm in _norms(other).items() if name in missing and norm is not None}
    zero = {name for name, norm in seen.norms.items() if norm == 0}
    if any(norm is not None and not math.isfinite(norm) for norm in seen.norms.values()):
        seen.spoiled = _blame(subject)
    if zero:
        other = copied(subject, training=True)
        if sum(_wake(parameter) for parameter in other.parameters()):  # wakes all of them
            _differentiate(other, subject, Backward())
            seen.revived = {name for name in zero if _norms(other).get(name)}
        seen.dead = zero - seen.revived
    return seen


def _differentiate(module: nn.Module, subject: Subject, seen: Backward, seed: int = 0) -> bool:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    with kept(seed), torch.enable_grad():
        before = random_state()
        with _Readers(names, seen.used):
            outputs = _outputs(module, subject)
        seen.random = seen.random or random_state() != before
        _descend(outputs)
    return bool(outputs)


def _outputs(module: nn.Module, subject: Subject) -> list[torch.Tensor]:
    return [tensor for tensor in floating(call(module, subject)) if tensor.requires_grad]


def _descend(outputs: list[torch.Tensor]) -> None:
    # Random weights, since the plain sum of a softmax or a normalised output has no gradient at all.
    torch.autograd.backward([(tensor * torch.randn_like(tensor)).mean() for tensor in outputs])


def _norms(module: nn.Module) -> dict[str, float | None]:
    return {
        name: None if parameter.grad is None else float(parameter.grad.norm())
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def _wake(parameter: nn.Parameter) -> bool:
    if parameter.is_floating_point() and not parameter.any():
        with kept():
            parameter.normal_(0, 0.1)
        return True
    return False


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(), other.nan_to_num())


def _blame(subject: Subject) -> tuple[str, Place | None] | None:
    module = copied(subject, training=True)
    with kept(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with torch.autograd.set_detect_anomaly(True):
                torch.default_generator.manual_seed(0)
                _descend(_outputs(module, subject))
        except RuntimeError as error:
            name = re.search(r"'(\w+)Backward\d*'", str(error))
            told = "\n".join(str(warning.message) for warning in caught)
            frames = [match for match in _FRAME.findall(told) if is_users_file(match[0])]
            frames = frames[max((i + 1 for i, f in enumerate(frames) if f[0].endswith("driver.py")), default=0) :]
            place = line_of(frames[-1][0], int(frames[-1][1])) if frames else None
            return (name.group(1) if name else "an operator"), place
    return None
