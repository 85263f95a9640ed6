"""The inputs of a target: what the flags say, what the file says, or what the first layer suggests."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin

from fxopt.capture.independent import independent_copy
from fxopt.errors import LoadError
from fxopt.inputs import Inputs
from fxopt.target.find import command
from fxopt.target.flags import make_inputs, read_flag
from fxopt.target.source import Source, same_randomness

_SHAPE = "where SHAPE is like 1x3x224x224, or 1x128:int64:0..30000 for integers"


def find_inputs(source: Source, name: str, module: nn.Module, flags: Sequence[str]) -> tuple[Inputs, tuple[str, ...]]:
    """The inputs to capture `module` with, and what to tell the user of them.

    Raises:
        LoadError: where there are none, or they do not fit the signature of `forward`.
    """
    if flags:
        inputs, notes = make_inputs(module, [read_flag(flag) for flag in flags])
        _check_signature(source, name, module, inputs)
        return inputs, notes
    if hasattr(source.namespace, "example_inputs"):
        inputs = _from_file(source)
        _check_signature(source, name, module, inputs)
        return inputs, ()
    return _guess(source, name, module)


def _from_file(source: Source) -> Inputs:
    value: Any = source.namespace.example_inputs
    if callable(value) and not isinstance(value, torch.Tensor):
        with source.running("cannot make 'example_inputs()'"):
            value = value()
    try:
        return Inputs.of(value)
    except LoadError as error:
        raise LoadError(f"'example_inputs' of '{source.label}': {error}") from error


def _check_signature(source: Source, name: str, module: nn.Module, inputs: Inputs) -> None:
    try:
        inspect.signature(module.forward).bind(*inputs.args, **inputs.kwargs)
    except TypeError as error:
        raise LoadError(
            f"the inputs {inputs.describe()} do not fit {_forward(module)}: {error}; "
            f"give {_flags(source, name, module)}"
        ) from error
    except ValueError:  # a forward without a signature takes what it takes
        return


def _guess(source: Source, name: str, module: nn.Module) -> tuple[Inputs, tuple[str, ...]]:
    found = _first_layer(module)
    if found is None or len(_arguments(module)) != 1:
        raise LoadError(
            f"'{source.label}' has no `example_inputs`, and they cannot be guessed for {_forward(module)}: define "
            f"`example_inputs` in it (a tensor, a tuple or a dict), or give {_flags(source, name, module)}"
        )
    path, layer = found
    tried: list[str] = []
    failure: Exception | None = None
    for text in _suggestions(module, layer):
        inputs, _ = make_inputs(module, [read_flag(text)])
        failure = _try(module, inputs)
        if failure is None:
            return inputs, (
                f"inputs: guessed {inputs.describe()} from the first layer '{path}' ({type(layer).__name__}); "
                f"change it by `--input {text}`",
            )
        tried.append(text)
    said = str(failure).strip().splitlines()
    raise LoadError(
        f"cannot guess the inputs of '{type(module).__name__}': from its first layer '{path}' "
        f"({type(layer).__name__}) {', '.join(tried)} were tried, the last gave {type(failure).__name__}: "
        f"{said[0] if said else ''}; give {_flags(source, name, module)}"
    ) from failure


def _first_layer(module: nn.Module) -> tuple[str, nn.Module] | None:
    for path, child in module.named_modules():
        if isinstance(child, (_ConvNd, nn.Linear, nn.Embedding)):
            lazy = isinstance(child, LazyModuleMixin)  # it takes its width from the inputs
            return None if lazy else (path or type(child).__name__, child)
    return None


def _suggestions(module: nn.Module, layer: nn.Module) -> Iterator[str]:
    batch = 2 if module.training else 1  # batch normalisation cannot train on one sample
    if isinstance(layer, nn.Embedding):
        for length in (128, 16, 1):
            yield f"{batch}x{length}:int64:0..{layer.num_embeddings}"
    elif isinstance(layer, nn.Linear):
        yield f"{batch}x{layer.in_features}"
        yield f"{batch}x16x{layer.in_features}"
    elif isinstance(layer, _ConvNd):
        channels = f"{batch}x{layer.in_channels}"
        for size in _sizes(layer):
            yield f"{channels}x{size}"


def _sizes(layer: _ConvNd) -> tuple[str, ...]:
    dimensions = len(layer.kernel_size)
    if isinstance(layer, _ConvTransposeNd):
        return tuple("x".join([str(size)] * dimensions) for size in (8, 1))
    if dimensions == 1:
        return ("128", "1024", "16000")
    if dimensions == 3:
        return ("16x112x112", "16x32x32", "16x16x16")
    sides = (28, 32, 64, 224, 8) if layer.in_channels == 1 else (224, 32, 64, 128, 256, 299, 8)
    return tuple(f"{side}x{side}" for side in sides)


def _try(module: nn.Module, inputs: Inputs) -> Exception | None:
    """What a forward of a copy raises; a copy, since a forward may change the module."""
    try:
        with torch.no_grad(), same_randomness():
            inputs.call(independent_copy(module))
    except Exception as error:
        return error
    return None


def _arguments(module: nn.Module) -> list[str]:
    """The arguments that `forward` must be given."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except ValueError:
        return ["x"]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p.name for p in parameters if p.default is p.empty and p.kind in (*positional, p.KEYWORD_ONLY)]
    # A forward(*args, **kwargs) mostly hands on one tensor.
    return named or ["x"]


def _flags(source: Source, name: str, module: nn.Module) -> str:
    given = " ".join(f"--input {argument}=SHAPE" for argument in _arguments(module))
    return f"`{command(source, name)} {given}`, {_SHAPE}"


def _forward(module: nn.Module) -> str:
    try:
        signature = str(inspect.signature(module.forward))
    except ValueError:
        signature = "(...)"
    return f"`{type(module).__name__}.forward{signature}`"
