"""A directory and the original module -> the result."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
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
from fxopt.artifact.weights import named_tensors, restore
from fxopt.capture.independent import independent_copy
from fxopt.capture.state import with_versions
from fxopt.contract import Pass
from fxopt.engines import Executable
from fxopt.engines.lower import after_passes, build
from fxopt.engines.table import find
from fxopt.errors import ArtifactError, SpecError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.modules import WithSettings
from fxopt.pipeline import replay
from fxopt.version import __version__

_RANGE = ".scale"


@with_versions()
def load(directory: str | PathLike[str], module: nn.Module, *, inputs: Any = None) -> GraphModule | Executable:
    """Make the result in `directory` again: its recipe replayed on the original module, then its weights.

    Where the run chose an engine, the result comes as that engine runs it, by the choices that were measured then.

    The outputs are those of the saved result to the bit, on the same machine and with the same torch.

    Args:
        directory: what `fxopt.save` or `fxopt run --out DIR` wrote.
        module: the original, of the same code and configuration; its weights do not matter, but where values decide on
            which way it goes. It is not changed.
        inputs: to capture it with, where those of the run could not be saved.

    Raises:
        EngineError: the engine of the run cannot run here.
        ArtifactError: where a file is missing or damaged, was written by an incompatible version, or belongs to
            another module.
    """
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
    ranged = frozenset(name.removesuffix(_RANGE) for name in weights if name.endswith(_RANGE))
    replayed = _replay(path, recipe, module, example, passes, ranged, weights)
    restore(replayed, weights, recipe["tied"], str(path))
    trains = set(recipe["trains"])
    for name, parameter in replayed.named_parameters():
        parameter.requires_grad_(name in trains)
    replayed.train(recipe["modes"]["training"])
    _set_modes(replayed, _recorded(replayed, recipe))
    engine = recipe.get("engine")
    if engine is None:
        return replayed
    if engine.get("passes"):
        replayed = after_passes(replayed, engine["passes"])
    found = find(engine["name"], engine["options"])
    if engine.get("max_error") is not None:
        found = found.within(engine["max_error"])
    return build(found, replayed, example, engine["choices"])


def _replay(
    path: Path,
    recipe: Mapping[str, Any],
    module: nn.Module,
    inputs: Inputs,
    passes: Sequence[Pass],
    ranged: frozenset[str],
    weights: Mapping[str, torch.Tensor],
) -> GraphModule:
    """Make the graph again. A result may have changed its mode after it was captured: then other modes are tried.

    What of a module is captured may depend on values: its own weights come first, then what it has of the result's.
    Calibration data itself is not kept: any will do, since the ranges are restored, those in `ranged`. A run without
    any took out what it would have given a range, so that is tried last.
    """
    before = _modes(module)
    failure: Exception | None = None
    try:
        tried = (_recorded(module, recipe), dict.fromkeys(before, False), dict.fromkeys(before, True), before)
        spared = [frozenset(one.get("spared", ())) for one in recipe["passes"]]
        for given in _own_weights_first(module, weights):
            for calibration, modes in itertools.product((None, ()), tried):
                _set_modes(given, modes)
                try:
                    replayed: GraphModule = replay(given, inputs, passes, spared, calibration, ranged)
                    _set(replayed, recipe.get("settings", {}))
                except Exception as error:  # another module may raise anything on these inputs
                    failure = failure or error
                    continue
                if fingerprint(replayed) == recipe["graph"]:
                    return replayed
    finally:
        _set_modes(module, before)
    problem = f"fails with {type(failure).__name__}: {failure}" if failure else "makes another graph than it did"
    raise ArtifactError(
        f"the recipe in '{path}' on this '{type(module).__name__}' {problem} ({_versions(recipe)}): expected the "
        "original module, of the same code and configuration, and with the same weights if it decides on values; else "
        "run `fxopt run` again"
    ) from failure


@torch.no_grad()
def _own_weights_first(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> Iterator[nn.Module]:
    yield module
    other = independent_copy(module)
    for name, tensor in named_tensors(other).items():
        if name in weights and weights[name].shape == tensor.shape:
            tensor.copy_(weights[name])
    yield other


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
    return Inputs(decode(saved["args"], tensors), decode(saved["kwargs"], tensors), saved.get("static", ()))


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ArtifactError(f"there is no '{path}': the result is not complete; run `fxopt run --out` again")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"cannot read '{path}': {error}; run `fxopt run --out` again") from error


def _modes(module: nn.Module) -> dict[str, bool]:
    return {path: child.training for path, child in module.named_modules()}


def _recorded(module: nn.Module, recipe: Mapping[str, Any]) -> dict[str, bool]:
    modes = recipe["modes"]
    others = set(modes["except"])
    return {path: modes["training"] is not (path in others) for path, _ in module.named_modules()}


def _set(module: nn.Module, settings: Mapping[str, Any]) -> None:
    for path, child in module.named_modules():
        if isinstance(child, WithSettings) and path in settings:
            child.set_to(settings[path])


def _set_modes(module: nn.Module, modes: Mapping[str, bool]) -> None:
    for path, child in module.named_modules():
        child.training = modes[path]
