"""On which device engines are built, and what is moved there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch

from fxopt import bench
from fxopt.capture.independent import independent_copy
from fxopt.engines.table import ENGINES
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs

_WITH_CANDIDATES = ("cpu", "cuda")


def place_for(asked: str, devices: Sequence[str], inputs: Inputs) -> torch.device:
    """Where inputs are if that is a GPU; else the first of `devices` that is there and that the engine runs on.

    Args:
        asked: an engine, or a word that stands for several.
        devices: by name, those that matter most first.
        inputs: an example.
    """
    held = next((tensor.device for tensor in inputs.tensors if tensor.device.type != "cpu"), None)
    if held is not None:
        return held
    engine = ENGINES.get(asked.partition("{")[0].strip())
    fits = _WITH_CANDIDATES if engine is None else engine.devices
    there = (torch.device(device) for device in devices if bench.unavailable(device) is None)
    return next((device for device in there if device.type in fits), torch.device(fits[0]))


def on(place: torch.device, module: GraphModule) -> GraphModule:
    """A module on a device: itself where it is there already."""
    tensors = [*module.parameters(), *module.buffers()]
    if all(tensor.device.type == place.type and place.index in (None, tensor.device.index) for tensor in tensors):
        return module
    return cast(GraphModule, independent_copy(module)).to(place)
