"""Reads a batch norm off a node as what it is in evaluation: a scale and a shift for each channel.

y = gamma (x - mean) / sqrt(var + eps) + beta  =  scale x + shift
scale = gamma / sqrt(var + eps)                   shift = beta - mean scale
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.contract import Skip
from fxopt.graph.affine import why_not_plain
from fxopt.graph.effects import is_written
from fxopt.graph.region import Region
from fxopt.graph.source import source_of

BatchNorm = nn.modules.batchnorm._BatchNorm
_RANK: dict[type[nn.Module], int] = {nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
NORM_CALL = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
"""What `F.batch_norm` is called with."""


@dataclass(frozen=True)
class Norm:
    """One call of a batch norm.

    Attributes:
        node: the call.
        input: what it is applied to.
        mean, var, gamma, beta: its tensors.
        eps: what it adds to the variance.
        module: the module that is called, or None where it is a function.
        rank: how many dimensions its input has, as far as it is known.
    """

    node: fx.Node
    input: fx.Node
    mean: torch.Tensor
    var: torch.Tensor
    gamma: torch.Tensor | None
    beta: torch.Tensor | None
    eps: float
    module: nn.Module | None
    rank: int | None

    def is_same(self, other: Norm) -> bool:
        """Whether both calls apply the very same scale and shift."""
        mine = (self.mean, self.var, self.gamma, self.beta)
        return self.eps == other.eps and all(
            a is b for a, b in zip(mine, (other.mean, other.var, other.gamma, other.beta), strict=True)
        )

    @property
    def scale(self) -> torch.Tensor:
        """The factor of each channel, in float64."""
        scale = torch.rsqrt(self.var.detach().double() + self.eps)
        return scale if self.gamma is None else scale * self.gamma.detach().double()

    @property
    def shift(self) -> torch.Tensor:
        """What is added to each channel, in float64."""
        shift = -self.mean.detach().double() * self.scale
        return shift if self.beta is None else shift + self.beta.detach().double()


def is_norm(node: fx.Node, region: Region) -> bool:
    """Whether `node` calls a batch norm, of whatever kind."""
    if node.op == "call_module":
        return isinstance(region.submodule(node), BatchNorm)
    return node.op == "call_function" and node.target in (F.batch_norm, torch.batch_norm)


def read_norm(node: fx.Node, region: Region) -> Norm | Skip:
    """The batch norm that `node` calls, or why it is not the same scale and shift for every input."""
    found = _read_module(node, region) if node.op == "call_module" else _read_function(node, region)
    if isinstance(found, Norm):
        tensors = (found.mean, found.var, found.gamma, found.beta)
        if any(is_written(tensor, region.program) for tensor in tensors if tensor is not None):
            found = "the graph writes into its statistics or parameters"
    return Skip(region.qualified(node), found, source_of(node)) if isinstance(found, str) else found


def rank_of(node: fx.Node) -> int | None:
    """How many dimensions the value of `node` has, or None where that is not known."""
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else len(shape)


def _read_module(node: fx.Node, region: Region) -> Norm | str:
    module = region.submodule(node)
    base = next((kind for kind in (*_RANK, nn.BatchNorm1d, nn.SyncBatchNorm) if isinstance(module, kind)), BatchNorm)
    reason = why_not_plain(module, base)
    if reason is not None:
        return reason
    assert isinstance(module, BatchNorm)
    if module.running_mean is None or module.running_var is None:
        return "it keeps no running statistics: it normalises by the batch"
    if module.training:
        return "it is in training mode: it normalises by the batch; call .eval() before to fold it"
    source = node.args[0] if node.args else node.kwargs.get("input")
    assert isinstance(source, fx.Node)
    rank = _RANK.get(base, rank_of(node))
    tensors = (module.running_mean, module.running_var, module.weight, module.bias)
    return Norm(node, source, *tensors, module.eps, module, rank)


def _read_function(node: fx.Node, region: Region) -> Norm | str:
    if node.target is not F.batch_norm:
        return "torch.batch_norm is called directly; only torch.nn.functional.batch_norm is read"
    given: dict[str, Any] = {**dict(zip(NORM_CALL, node.args, strict=False)), **node.kwargs}
    if region.flag(given.get("training", False)) is not False:
        return "it is called in training mode: it normalises by the batch"
    values: list[Any] = []
    for name in ("running_mean", "running_var", "weight", "bias"):
        source = given.get(name)
        if source is None:
            values.append(None)
        elif isinstance(source, fx.Node) and source.op == "get_attr":
            values.append(region.attribute(source))
        else:
            return f"its {name!r} is computed, not a parameter or buffer"
    mean, var, gamma, beta = values
    if mean is None or var is None:
        return "it is given no running statistics: it normalises by the batch"
    eps = given.get("eps", 1e-5)
    if not isinstance(given["input"], fx.Node) or not isinstance(eps, float):
        return "its 'eps' is computed"
    return Norm(node, given["input"], mean, var, gamma, beta, eps, None, rank_of(node))
