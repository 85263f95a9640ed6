"""Weights from a file, checked name by name and shape by shape before any of them is loaded."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn.parameter import is_lazy

from fxopt.errors import LoadError

_WRAPPERS = ("state_dict", "model_state_dict", "model")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
"""Of weights, in the order in which a directory's file of them is looked for: transformers keeps more in `.pt`."""
_SHOWN = 8
_EXTRA = "_extra_state"
"""How the key ends of what a module keeps by `get_extra_state`, which may be anything."""


def load_weights(module: nn.Module, path: Path) -> tuple[str, ...]:
    """Load the weights in `path` into `module`, all of them or none, and return what to tell the user.

    Raises:
        LoadError: where the file cannot be read, or its keys or shapes are not those of the module.
    """
    tensors, notes = _named_as(module, read_tensors(path), path)
    state = module.state_dict()
    expected = {
        key: value
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and not is_lazy(value) and not key.endswith(_EXTRA)
    }
    present = {_memory(expected[key]) for key in tensors if key in expected}
    # Of tensors that share memory a file may hold only one.
    missing = [key for key, value in expected.items() if key not in tensors and _memory(value) not in present]
    unexpected = [key for key in tensors if key not in state and not key.endswith(_EXTRA)]
    wrong = [
        f"{key} is {_shape(tensors[key])}, expected {_shape(value)}"
        for key, value in expected.items()
        if key in tensors and tensors[key].shape != value.shape
    ]
    first: dict[Any, str] = {}
    pairs = [(first.setdefault(_memory(expected[key]), key), key) for key in tensors if key in expected]
    several = [key for one, key in pairs if not torch.equal(tensors[one], tensors[key])]
    if missing or unexpected or wrong or several:
        parts = [
            _listed("missing", missing),
            _listed("unexpected", unexpected),
            _listed("of another shape", wrong),
            _listed("one with another weight in the model and not in the file", several),
        ]
        raise LoadError(
            f"the weights in '{path}' are not those of '{type(module).__name__}':{''.join(parts)}\n"
            "  expected the state_dict of this very model"
        )
    module.load_state_dict(tensors, strict=False)
    return notes


def read_tensors(path: Path) -> dict[str, Any]:
    """The tensors in a safetensors file or in a state_dict that torch saved, by name, and the extra state of modules.

    Raises:
        LoadError: where the file is missing, damaged, or holds anything but tensors.
    """
    if path.is_dir():
        files = [file for suffix in _SUFFIXES for file in sorted(path.glob(f"*{suffix}"))]
        such_as = f", such as '{files[0]}'" if files else ""
        raise LoadError(f"'{path}' is a directory: expected a file, safetensors or a saved state_dict{such_as}")
    if not path.is_file():
        raise LoadError(f"there is no file '{path}': expected weights, as safetensors or as a saved state_dict")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise LoadError(f"cannot read '{path}' as safetensors: {error}") from error
    try:
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise LoadError(
            f"'{path}' holds more than tensors, or is damaged, and is not opened since it could run code: save "
            "`model.state_dict()` instead, by torch.save or safetensors.torch.save_file"
        ) from error
    except Exception as error:  # a damaged file can raise anything
        raise LoadError(f"cannot read '{path}' as a state_dict: {error}") from error
    for wrapper in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping):
        raise LoadError(f"'{path}' holds a {type(loaded).__name__}: expected a state_dict")
    kept = {str(key): value for key, value in loaded.items()}
    return {key: value for key, value in kept.items() if isinstance(value, torch.Tensor) or key.endswith(_EXTRA)}


def _named_as(module: nn.Module, tensors: dict[str, Any], path: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Take off the prefix that a wrapper put before each key, where that is all that differs."""
    keys = set(module.state_dict())
    for prefix in ("module.", "model.", "_orig_mod."):
        if tensors and all(key.startswith(prefix) for key in tensors) and not any(k.startswith(prefix) for k in keys):
            short = {key.removeprefix(prefix): value for key, value in tensors.items()}
            return short, (f"weights: took the prefix '{prefix}' off each key of '{path}'",)
    return tensors, ()


def _memory(tensor: torch.Tensor) -> tuple[Any, ...]:
    if tensor.numel() == 0 or tensor.layout is not torch.strided:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _listed(what: str, items: Iterable[str]) -> str:
    names = list(items)
    if not names:
        return ""
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"\n  {len(names)} {what}: {', '.join(names[:_SHOWN])}{more}"
