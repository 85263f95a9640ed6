"""A result -> a directory."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from fxopt import registry, spec
from fxopt.artifact.directory import RECIPE, writing
from fxopt.artifact.source import source
from fxopt.artifact.tree import encode
from fxopt.artifact.weights import collect, named_tensors
from fxopt.contract import Pass
from fxopt.errors import ArtifactError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.ledger import Ledger
from fxopt.modules import WithSettings
from fxopt.record import Record, plain
from fxopt.version import __version__

SCHEMA = "2.0"
"""Version of the recipe: the first number changes when old readers can't read it any more."""
WEIGHTS = "weights.safetensors"
INPUTS = "inputs.safetensors"
CODE = "graph.py"


class Result(Protocol):
    """What a run gives, as far as it is kept."""

    @property
    def module(self) -> GraphModule:
        """The rewritten module."""

    @property
    def passes(self) -> Sequence[Pass]:
        """The passes that ran, in order."""

    @property
    def ledger(self) -> Ledger:
        """What each of them did."""

    @property
    def inputs(self) -> Inputs:
        """What it was captured with."""

    @property
    def record(self) -> Record:
        """What there is to report."""


def save(result: Result, directory: str | PathLike[str], renderings: Mapping[str, str] | None = None) -> None:
    """Write a result: weights, the recipe to make it again, the code of its graphs, and its reports.

    All of it or nothing is written; an older result in the same place is replaced.

    Args:
        result: of a run.
        directory: a free name, an empty directory, or an older result.
        renderings: the reports to go with it, by file name.

    Raises:
        ArtifactError: where the directory holds anything else or cannot be written, or a pass is not installed,
            so that no recipe can name it.
        PassError: a module that a pass put in is in a state that can't be kept.
    """
    texts = renderings or {}
    kept = [(each, done) for each, done in zip(result.passes, result.ledger, strict=True) if not done.is_reverted]
    text = _spec([each for each, _ in kept])
    target = result.record["target"]
    code = source(result.module, target, text)
    weights, tied = collect(result.module)
    tensors: dict[str, torch.Tensor] = {}
    recipe: dict[str, Any] = {
        "schema": SCHEMA,
        "versions": {"fxopt": __version__, "torch": torch.__version__, "python": platform.python_version()},
        "target": target,
        "spec": text,
        "passes": [
            {"name": each.name, "options": plain(dict(done.options)), "spared": sorted(done.spared)}
            for each, done in kept
        ],
        "inputs": _inputs(result.inputs, tensors),
        "guards": result.record["capture"]["guards"],
        "modes": _modes(result.module),
        "trains": [name for name, parameter in result.module.named_parameters() if parameter.requires_grad],
        "tied": tied,
        "settings": {
            path: child.settings() for path, child in result.module.named_modules() if isinstance(child, WithSettings)
        },
        "engine": _engine(result),
        "graph": fingerprint(result.module),
        "files": sorted([RECIPE, WEIGHTS, INPUTS, CODE, *texts]),
    }
    with writing(Path(directory)) as new:
        _write(weights, new / WEIGHTS)
        _write(tensors, new / INPUTS)
        (new / CODE).write_text(code, encoding="utf-8")
        for name, rendering in texts.items():
            (new / name).write_text(rendering, encoding="utf-8")
        (new / RECIPE).write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")


def fingerprint(module: GraphModule) -> str:
    """A digest of the graphs of a module and of the modules and tensors that they use, whatever these hold."""
    digest = hashlib.sha256()
    for path, child in module.named_modules():
        digest.update(f"{path} {type(child).__name__}\n".encode())
        if isinstance(child, GraphModule):
            for mode, graph in child.graphs.items():
                digest.update(f"{mode}\n{graph.python_code('self').src}\n".encode())
    digest.update("\n".join(sorted(named_tensors(module))).encode())
    return digest.hexdigest()


def _write(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise ArtifactError(f"cannot write '{path.name}': safetensors cannot hold these tensors: {error}") from error


def _spec(passes: Sequence[Pass]) -> str:
    for one in passes:
        if registry.available().get(one.name) is not type(one):
            raise ArtifactError(
                f"cannot save the recipe: pass '{one.name}' ({type(one).__module__}.{type(one).__qualname__}) is not "
                "installed; offer it by an entry point in the group 'fxopt.passes'"
            )
    return spec.render(passes)


def _inputs(inputs: Inputs, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    described = {"description": inputs.describe()}
    try:
        return {
            **described,
            "args": encode(inputs.args, "args", tensors),
            "kwargs": encode(dict(inputs.kwargs), "kwargs", tensors),
            "static": list(inputs.static),
        }
    except ArtifactError as error:
        tensors.clear()
        return {**described, "not_saved": str(error)}


def _engine(result: Result) -> dict[str, Any] | None:
    engines = result.record["engines"]
    if engines is None or engines["chosen"] is None:
        return None
    rung = engines["rungs"][engines["chosen"]]
    name, options = rung["engine"], rung["options"]
    chosen = {"name": name, "options": options, "passes": rung["passes"], "choices": rung["choices"]}
    return {**chosen, "max_error": engines["max_error"]}


def _modes(module: GraphModule) -> dict[str, Any]:
    others = [path for path, child in module.named_modules() if child.training is not module.training]
    return {"training": module.training, "except": others}
