"""Calls a copy of the model, and leaves random state, threads' modes and the original as they were."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt.capture.independent import independent_copy
from fxopt.findings import Subject

UNWRITTEN = {"aten::empty_like", "aten::new_empty", "aten::new_empty_strided", "aten::resize_"}
"""These return whatever the memory held before."""


def unregistered(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The plain attributes of a module: all but those where it keeps what is registered."""
    registered = ("_parameters", "_buffers", "_modules")
    return ((name, value) for name, value in vars(module).items() if name not in registered)


def copied(subject: Subject, training: bool) -> nn.Module:
    """A copy of the model that may be run and trained."""
    assert subject.module is not None
    return independent_copy(subject.module).train(training)


def call(module: nn.Module, subject: Subject) -> Any:
    """One forward, with inputs of its own."""
    assert subject.inputs is not None
    own = subject.inputs.map(lambda tensor: tensor.detach().clone())
    return module(*own.args, **dict(own.kwargs))


@contextmanager
def kept(seed: int = 0) -> Iterator[None]:
    """Seed everything random, and put it back at the end."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    grad, default = torch.is_grad_enabled(), torch.get_default_dtype()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(default)


def random_state() -> tuple[object, ...]:
    """What tells whether random numbers were drawn on the CPU in between."""
    numpy = np.random.get_state(legacy=False)["state"]
    return random.getstate(), numpy["key"].tobytes(), numpy["pos"], torch.get_rng_state().numpy().tobytes()


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in what a forward returned, dataclasses and the like included."""
    if hasattr(value, "to_tuple"):
        value = value.to_tuple()
    elif hasattr(value, "__dataclass_fields__"):
        value = dict(vars(value))
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def floating(value: Any) -> list[torch.Tensor]:
    """The tensors that may have a gradient."""
    return [tensor for tensor in tensors(value) if tensor.is_floating_point() and tensor.numel()]


@contextmanager
def telling_modules(module: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the qualified name of the module that runs on top of `stack`."""
    with ExitStack() as hooks:
        hooks.callback(stack.clear)
        for path, child in module.named_modules():
            if not isinstance(child, torch.jit.ScriptModule):
                hooks.enter_context(child.register_forward_pre_hook(_pusher(stack, path), prepend=True))
                hooks.enter_context(child.register_forward_hook(_popper(stack), always_call=True))
        yield


def _pusher(stack: list[str], path: str) -> Callable[..., None]:
    return lambda module, args: stack.append(path)


def _popper(stack: list[str]) -> Callable[..., None]:
    def pop(module: nn.Module, args: Any, output: Any) -> None:
        if stack:
            stack.pop()

    return pop
