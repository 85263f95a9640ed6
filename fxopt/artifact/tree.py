"""Nested inputs <-> JSON beside a table of tensors, without pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from fxopt.errors import ArtifactError

_PLAIN = (str, int, bool, type(None))


def encode(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON that stands for `value`; its tensors go into `tensors` under names that begin with `name`.

    Raises:
        ArtifactError: for an object that only pickle could write.
    """
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized or value.is_complex() or value.device.type == "meta":
            raise ArtifactError(f"{name} is a tensor that safetensors cannot hold ({value.dtype}, {value.layout})")
        while name in tensors:  # of {"a": {"b": x}, "a.b": y}, or keys 1 and "1"
            name += "_"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if type(value) in _PLAIN:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) in (list, tuple):
        items = [encode(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return {type(value).__name__: items}
    if isinstance(value, torch.Size):
        return {"size": list(value)}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, slice):
        parts = (value.start, value.stop, value.step)
        return {"slice": [encode(part, f"{name}.{index}", tensors) for index, part in enumerate(parts)]}
    if isinstance(value, Mapping) and type(value) is dict:
        keys = [encode(key, f"{name}.key", tensors) for key in value]
        items = [encode(item, f"{name}.{key}", tensors) for key, item in value.items()]
        return {"dict": [list(pair) for pair in zip(keys, items, strict=True)]}
    raise ArtifactError(f"{name} is a '{type(value).__name__}'")


def decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The value that `encode` made JSON of."""
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "float":
        return float(content)
    if kind == "size":
        return torch.Size(content)
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "device":
        return torch.device(content)
    if kind == "slice":
        return slice(*(decode(part, tensors) for part in content))
    if kind == "dict":
        return {decode(key, tensors): decode(item, tensors) for key, item in content}
    return {"list": list, "tuple": tuple}[kind](decode(item, tensors) for item in content)
