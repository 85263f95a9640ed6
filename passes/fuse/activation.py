"""Reads an activation off a node: as a module, a function or a method, in place or not."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.contract import Skip
from fxopt.graph import Region, source_of, why_not_plain
from fxopt.modules import Activation

# Arguments beside the input, in the order of the call, with their defaults.
_ARGUMENTS: dict[str, dict[str, Any]] = {
    "relu": {},
    "relu6": {},
    "leaky_relu": {"negative_slope": 0.01},
    "silu": {},
    "gelu": {"approximate": "none"},
    "hardswish": {},
    "sigmoid": {},
    "tanh": {},
    "hardtanh": {"min_val": -1.0, "max_val": 1.0},
}
# nn.ReLU6 is an nn.Hardtanh: the narrower one first.
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
    nn.Tanh: "tanh",
    nn.Hardtanh: "hardtanh",
}
_FUNCTIONS: dict[Any, str] = {
    getattr(space, spelled): name
    for name in _ARGUMENTS
    for spelled in (name, f"{name}_")
    for space in (torch, F, torch._C._nn, torch.Tensor)
    if hasattr(space, spelled)
}
_METHODS = {spelled: name for name in ("relu", "sigmoid", "tanh") for spelled in (name, f"{name}_")}


def read_activation(node: fx.Node, region: Region) -> Activation | Skip | None:
    """The activation that `node` computes; None where it is none, a `Skip` where it must stay a call of its own."""
    if node.op == "call_module":
        module = region.submodule(node)
        base = next((kind for kind in _MODULES if isinstance(module, kind)), None)
        if base is None:
            return None
        reason = why_not_plain(module, base)
        if reason is not None:
            return Skip(region.qualified(node), reason, source_of(node))
        name = _MODULES[base]
        return Activation(name, tuple((key, getattr(module, key)) for key in _ARGUMENTS[name]))
    table: dict[Any, str] = {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op, {})
    spelled = table.get(node.target)
    if spelled is None or "out" in node.kwargs:
        return None
    known = _ARGUMENTS[spelled]
    given = {**known, **dict(zip(known, node.args[1:], strict=False)), **node.kwargs}
    arguments = tuple((key, given[key]) for key in known)
    if any(isinstance(value, fx.Node) for _, value in arguments):
        return Skip(region.qualified(node), "its arguments are computed", source_of(node))
    return Activation(spelled, arguments)
