"""The same module with other parameters, made without running any constructor."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def rebuild(module: nn.Module, kind: type[M], **parameters: torch.Tensor | None) -> M:
    """A `kind` with all attributes of `module`, where `parameters` replace those of the same name.

    Parameters that are not named are the very same objects, so ties stay. A new one trains if and only if
    the old one did (a new bias follows the weight). Hooks are shared by nobody: a fresh set each.
    """
    made = kind.__new__(kind)
    for key, value in module.__dict__.items():
        made.__dict__[key] = copy.copy(value) if isinstance(value, dict) else value
    for name, tensor in parameters.items():
        old = module._parameters.get(name)
        like = old if old is not None else module._parameters["weight"]
        trains = like is not None and like.requires_grad
        made._parameters[name] = None if tensor is None else nn.Parameter(tensor, requires_grad=trains)
    return made
