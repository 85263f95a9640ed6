"""The linear layers of a module."""

from __future__ import annotations

import torch

from fxopt.engines.layer import Layer
from fxopt.engines.layers import Layers
from fxopt.graph import Effects, GraphModule

_DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.float16, torch.bfloat16)}


class Found(Layers):
    """The linear layers of a module, by name, and which of them cannot have features first.

    Args:
        module: whose nodes have shapes in their metadata.
        device: type of the device that it is on.
    """

    def __init__(self, module: GraphModule, device: str):
        super().__init__(module, lambda dtype: _why_not(dtype, device))
        # Where memory is written, a copy of its value in another layout would go stale.
        written = {region: Effects(region).written() for region in self.regions}
        self.named: dict[str, Layer] = {}
        self.stays_last: set[str] = set()
        for layer in self.layers:
            if layer.kind != "linear":
                continue
            key, others = self.key(layer), {layer.input, layer.last, layer.other}
            self.named[key] = layer
            if _broadcasts(layer) or not written[self.region_of[layer.node]].isdisjoint(others):
                self.stays_last.add(key)


def zeros(layer: Layer) -> float:
    """Share of zeros in the weight of a layer, from 0 to 1."""
    return 1 - float(layer.weight.count_nonzero()) / layer.weight.numel()


def _why_not(dtype: torch.dtype, device: str) -> str | None:
    if dtype in _DTYPES[device]:
        return None
    known = ", ".join(map(str, _DTYPES[device]))
    return f"it is {dtype}, the sparse products on '{device}' are those of {known}"


def _broadcasts(layer: Layer) -> bool:
    """Whether what is added has another shape than the output, or another dtype."""
    if layer.other is None:
        return False
    meta = layer.other.meta.get("tensor_meta")
    outputs = torch.Size((*layer.shape[:-1], layer.weight.shape[0]))
    return meta is None or meta.shape != outputs or meta.dtype is not layer.weight.dtype
