"""Whether a captured module does what the original does: outputs, gradients, state, random stream."""

from __future__ import annotations

import copy
import random
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt.capture.independent import independent_copy
from fxopt.nested import flatten
from tests.models import Case


def assert_same(left: Any, right: Any) -> None:
    """Equal structure, types and values, to the bit."""
    (lefts, left_spec), (rights, right_spec) = flatten(left), flatten(right)
    assert left_spec == right_spec
    for one, other in zip(lefts, rights, strict=True):
        assert type(one) is type(other)
        if isinstance(one, torch.Tensor):
            assert one.dtype == other.dtype
            assert one.shape == other.shape
            torch.testing.assert_close(one.detach(), other.detach(), rtol=0, atol=0, equal_nan=True)
        else:
            assert one == other


def step(module: nn.Module, args: tuple[Any, ...], kwargs: Any, seed: int = 0) -> tuple[Any, ...]:
    """Outputs, gradients, inputs and state after, and the random state after one forward and backward."""
    args, kwargs = copy.deepcopy((args, dict(kwargs)))
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and _may_require_grad(module):
            leaf.requires_grad_()
    torch.manual_seed(seed)
    random.seed(seed)
    module.zero_grad(set_to_none=True)
    output = module(*args, **kwargs)
    differentiable = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.grad_fn is not None]
    if differentiable:
        sum(t.float().pow(2).sum() for t in differentiable).backward()
    parameters = {name: parameter.grad for name, parameter in module.named_parameters()}
    inputs = [t.grad for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    return output, parameters, inputs, (args, kwargs), dict(module.state_dict()), torch.get_rng_state()


def assert_agree(
    original: nn.Module, captured: nn.Module, case: Case, *, modes: tuple[bool, ...] = (False, True)
) -> None:
    """Run copies of both side by side, several calls in a row, on the example, other values and other batch sizes."""
    for mode in modes:
        one, other = independent_copy(original).train(mode), independent_copy(captured).train(mode)
        assert_side_by_side(one, other, case)


def assert_side_by_side(one: nn.Module, other: nn.Module, case: Case) -> None:
    for seed in (1, 2, 3):
        for times in (1, 3):
            args = bigger(case.example(seed), times)
            kwargs = bigger(case.kwargs, times)
            assert_same(step(one, args, kwargs, seed), step(other, args, kwargs, seed))


def bigger(value: Any, times: int) -> Any:
    """The same inputs with the batch repeated."""
    return pytree.tree_map_only(torch.Tensor, lambda t: torch.cat([t] * times), value)


def _may_require_grad(module: nn.Module) -> bool:
    return not getattr(module, "writes_input", False) and "WritesInput" not in type(module).__name__
