"""A directory and the original module -> the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from fxopt import spec
from fxopt.artifact.directory import read_recipe
from fxopt.artifact.save import INPUTS, SCHEMA, WEIGHTS, fingerprint
from fxopt.artifact.tree import decode
from fxopt.artifact.weights import restore
from fxopt.errors import ArtifactError, SpecError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.version import __version__


def load(directory: str | PathLike[str], module: nn.Module, *, inputs: Any = None) -> GraphModule:
    """Make the result in `directory` again: its recipe replayed on the original module, then its weights.

    The outputs are those of the saved result to the bit, on the same machine and with the same torch.

    Args:
        directory: what `fxopt run --out DIR` wrote.
        module: the original, of the same code and configuration; its weights do not matter. It is not changed.
        inputs: to capture it with, where those of the run could not be saved.

    Raises:
        ArtifactError: where a file is missing or damaged, was written by an incompatible version, or belongs to
            another module.
    """
    from fxopt.pipeline import replay

    path = Path(directory)
    recipe = read_recipe(path)
    _check_version(path, recipe)
    try:
        passes = spec.parse(recipe["spec"])
    except SpecError as error:
        raise ArtifactError(
            f"cannot replay the recipe in '{path}': {error}\n  install the package that offers this pass, in the "
            "version that the result was made with"
        ) from error
    example = _inputs(path, recipe) if inputs is None else Inputs.of(inputs)
    weights = _tensors(path / WEIGHTS)
    with _modes_as(module, recipe["modes"]):
        replayed: GraphModule = replay(module, example, passes)
    if fingerprint(replayed) != recipe["graph"]:
        raise ArtifactError(
            f"the recipe in '{path}' makes another graph of this '{type(module).__name__}' than it did "
            f"({_versions(recipe)}): expected the original module, of the same code and configuration; "
            "else run `fxopt run` again"
        )
    restore(replayed, weights, recipe["tied"], str(path))
    return replayed


def _check_version(path: Path, recipe: Mapping[str, Any]) -> None:
    written = str(recipe.get("schema", "none"))
    if written.partition(".")[0] != SCHEMA.partition(".")[0]:
        raise ArtifactError(
            f"'{path}' was written in version {written} of the recipe, this fxopt reads {SCHEMA}: use the fxopt that "
            f"wrote it ({_versions(recipe)}), or run `fxopt run` again"
        )


def _versions(recipe: Mapping[str, Any]) -> str:
    then = recipe.get("versions", {})
    now = {"fxopt": __version__, "torch": torch.__version__}
    return ", ".join(f"{name} {then.get(name, '?')} then, {version} now" for name, version in now.items())


def _inputs(path: Path, recipe: Mapping[str, Any]) -> Inputs:
    saved = recipe["inputs"]
    if "not_saved" in saved:
        raise ArtifactError(
            f"the inputs of the run in '{path}' could not be saved, since {saved['not_saved']}: give them by "
            "`fxopt.load(directory, module, inputs=...)`"
        )
    tensors = _tensors(path / INPUTS)
    return Inputs(decode(saved["args"], tensors), decode(saved["kwargs"], tensors))


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ArtifactError(f"there is no '{path}': the result is not complete; run `fxopt run --out` again")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"cannot read '{path}': {error}; run `fxopt run --out` again") from error


@contextmanager
def _modes_as(module: nn.Module, modes: Mapping[str, Any]) -> Iterator[None]:
    """Put each part of a module into the mode it was captured in, and back."""
    before = [(child, child.training) for child in module.modules()]
    others = set(modes["except"])
    try:
        for path, child in module.named_modules():
            child.training = modes["training"] is not (path in others)
        yield
    finally:
        for child, training in before:
            child.training = training
