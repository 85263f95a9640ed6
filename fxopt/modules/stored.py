"""Quantisers as modules that hold and give integers: what is the same for every runtime that takes them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.errors import EngineError
from fxopt.modules.fake_quantize import FakeQuantize
from fxopt.modules.fused import Fused
from fxopt.modules.mask import Mask, held_weight
from fxopt.modules.quantized import SUFFIX, QuantizedEmbedding, quantized_weights

_BYTE = 8


class StoredValue(nn.Module):
    """x  =>  an integer of 8 bits, clipped to fewer where the quantiser has fewer, and the value that it stands for."""

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, fake: FakeQuantize):
        super().__init__()
        self.axis = fake.axis
        self.low, self.high = fake.low, fake.high
        self.narrow = fake.bits < _BYTE
        self.register_buffer("scale", fake.step)
        self.register_buffer("zero_point", fake.zero_point.to(torch.int8 if fake.symmetric else torch.uint8))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The same values, through an integer."""
        stored = self.quantized(input.float())
        # Behind the integer, so that a runtime still sees the kernel that gives integers.
        stored = stored.clamp(self.low, self.high) if self.narrow else stored
        return self.dequantized(stored).to(input.dtype)

    def quantized(self, input: torch.Tensor) -> torch.Tensor:
        """The integers, in the runtime's operator."""
        raise NotImplementedError

    def dequantized(self, stored: torch.Tensor) -> torch.Tensor:
        """What they stand for, in the runtime's operator."""
        raise NotImplementedError


class StoredWeight(nn.Module):
    """Whatever it is given  =>  the weight, from its integers."""

    stored: torch.Tensor
    scale: torch.Tensor

    def __init__(self, fake: FakeQuantize, weight: torch.Tensor):
        super().__init__()
        scale, shape = fake.step, [1] * weight.dim()
        if fake.axis is not None:
            shape[fake.axis] = -1
        self.axis = fake.axis
        places = (weight.detach() / scale.reshape(shape)).round().clamp(fake.low, fake.high)
        self.register_buffer("stored", (places * fake.spread).to(torch.int8))
        self.register_buffer("scale", fake.step_of_bytes)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The weight, in the runtime's operator."""
        raise NotImplementedError


class _Rows(nn.Module):
    """ids  =>  the rows of the weight's integers, times their scales: the rest of the table stays integers"""

    def __init__(self, weight: StoredWeight):
        super().__init__()
        self.by_row = weight.axis == 0
        self.register_buffer("stored", weight.stored)
        self.register_buffer("scale", weight.scale.reshape(-1, 1))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """The rows."""
        scale = self.get_buffer("scale")
        rows = F.embedding(input, self.get_buffer("stored")).to(torch.float32)
        return rows * (F.embedding(input, scale) if self.by_row else scale.reshape(()))


def with_integers(
    module: nn.Module,
    value: Callable[[FakeQuantize], nn.Module],
    weight: Callable[[FakeQuantize, torch.Tensor, nn.Module | None], nn.Module],
) -> nn.Module:
    """A copy of `module` with all quantisers in a runtime's form, and tables of embeddings as integers.

    Args:
        module: calibrated or frozen.
        value: makes the form for what quantises values.
        weight: makes it for what quantises the given weight of the given module; None for a parameter of a graph.

    Raises:
        EngineError: for a quantiser that has no range, or is wider than 8 bits, or a batch norm that is not folded.
    """
    duplicate = copy.deepcopy(module).eval()
    for path, owner, leaf, fake in list(quantized_weights(duplicate)):
        _check(f"{path}.{leaf}{SUFFIX}", fake)
        if isinstance(owner, Fused) and owner.bn is not None:
            raise EngineError(f"{path!r} still holds its batch norm: run 'quantize-freeze', which folds it")
        given = owner.scaled_weight() if isinstance(owner, Fused) else held_weight(owner, leaf)
        if isinstance(owner, Fused):
            owner.settle_bias()
        if isinstance(owner, QuantizedEmbedding):
            duplicate.set_submodule(path, _Rows(StoredWeight(fake, given)))
        else:
            owner._modules[f"{leaf}{SUFFIX}"] = weight(fake, given, owner)
    for graph in [child for child in duplicate.modules() if isinstance(child, fx.GraphModule)]:
        for name, fake, parameter in list(_quantized_parameters(graph)):
            _check(name, fake)
            graph.set_submodule(name, weight(fake, parameter, None))
    for name, child in list(duplicate.named_modules()):
        if isinstance(child, FakeQuantize):
            _check(name, child)
            duplicate.set_submodule(name, value(child))
    return duplicate


def _quantized_parameters(graph: fx.GraphModule) -> Iterator[tuple[str, FakeQuantize, torch.Tensor]]:
    """The quantisers of parameters that the graph hands to functions: name, quantiser, what it is given of which."""
    for node in graph.graph.nodes:
        fake = _called(node, graph)
        if not isinstance(fake, FakeQuantize):
            continue
        source: Any = node.args[0]
        mask = _called(source, graph)
        read = source.args[0] if isinstance(mask, Mask) else source
        if read.op == "get_attr":
            owner, _, leaf = str(read.target).rpartition(".")
            parameter = graph.get_submodule(owner)._parameters.get(leaf)
            if parameter is not None:
                yield str(node.target), fake, mask(parameter) if isinstance(mask, Mask) else parameter


def _called(node: fx.Node, graph: fx.GraphModule) -> nn.Module | None:
    return graph.get_submodule(str(node.target)) if node.op == "call_module" else None


def _check(name: str, fake: FakeQuantize) -> None:
    if not fake.ready:
        raise EngineError(f"{name!r} never observed anything, so it has no range: calibrate, or run 'quantize-freeze'")
    if fake.bits > _BYTE:
        raise EngineError(f"{name!r} has {fake.bits} bits, and integer kernels take at most {_BYTE}")
