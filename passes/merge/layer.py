"""A linear layer with all of its calls."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.fx as fx

from fxopt.contract import Skip
from fxopt.graph import Affine, Program, Region, read_affine, source_of


@dataclass(frozen=True)
class Layer:
    """A linear layer with all of its calls, in any graph."""

    affine: Affine
    calls: tuple[Affine, ...]

    @staticmethod
    def of(affine: Affine, program: Program) -> Layer | Skip:
        """Find the calls, or say why the layer must stay as it is."""
        calls: dict[fx.Node, Affine] = {}
        reason = None if affine.is_bare else "what follows was fused into it; let 'merge' come before 'fuse'"
        if affine.module is not None and list(affine.module.children()):
            reason = "it holds a mask or a quantiser"
        if affine.module is not None and program.inside_opaque(affine.module):
            reason = "the Python code around it may call it, unseen by the graph"
        for tensor in (affine.weight, affine.bias):
            for reader in program.readers(tensor) if tensor is not None else ():
                for node in reader.users if reader.op == "get_attr" else (reader,):
                    call = read_affine(node, program.region_of(node))
                    if isinstance(call, Affine) and call.weight is affine.weight and call.bias is affine.bias:
                        calls[node] = call
                    else:
                        other = program.region_of(node).qualified(node)
                        reason = f"its parameters are tied: {other!r} reads them too"
        if len({call.input for call in calls.values()}) < len(calls):
            reason = "it is called twice on one input"
        region = program.region_of(affine.node)
        if any(program.region_of(node).module is not region.module for node in calls):
            reason = "graphs of several modules call it"
        if reason is not None:
            return Skip(region.qualified(affine.node), reason, source_of(affine.node))
        return Layer(affine, tuple(calls.values()))

    def call_on(self, value: fx.Node) -> Affine:
        """Its call on one input."""
        return next(call for call in self.calls if call.input is value)

    def key(self, training: bool) -> tuple[Any, ...]:
        """What layers that merge agree in."""
        weight, bias = self.affine.weight, self.affine.bias
        trains = (weight.requires_grad, (weight if bias is None else bias).requires_grad)
        biased = training and any(trains) and bias is not None
        return frozenset(call.input for call in self.calls), weight.dtype, weight.device, trains, biased

    def why_apart(self, other: Layer, region: Region) -> str:
        """What keeps it from merging with another on the same input."""
        what = ("what else they are called on", "dtype", "device", "what of them trains", "having a bias to train")
        differs = next(name for name, a, b in zip(what, self.key(True), other.key(True), strict=True) if a != b)
        return f"it and '{region.qualified(other.affine.node)}', on the same input, differ in {differs}"

    def skip(self, reason: str, region: Region) -> Skip:
        """Say that it stays."""
        return Skip(region.qualified(self.affine.node), reason, source_of(self.affine.node))
