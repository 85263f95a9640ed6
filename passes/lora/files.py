"""Adapters as files that PEFT reads and writes: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from fxopt.errors import ArtifactError
from fxopt.graph import GraphModule
from passes.lora.active import adapters, names, root_of, saved_with, takes_part
from passes.lora.adapter import Adapter, Beside, WeightAdapter, can_be_called
from passes.lora.entries import alike, nested, read_entries, to_entry, write_beside, write_entries
from passes.lora.load import Loading
from passes.lora.peft_config import configuration
from passes.lora.settings import Settings, to_settings
from passes.lora.targets import nearest_names

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
SLICES = "slices"
"""What the metadata of the tensors call the columns of a sliced B, which PEFT has no option for."""


def save_adapter(module: nn.Module, directory: str | Path, name: str = "default") -> None:
    """Write one adapter, and the modules that are saved with it, in the format of PEFT.

    What the init took out of a base weight is put back: the file is an adapter of the original weights, of twice the
    rank. Of init loftq, which rounds the weights, it is one of the rounded weights. PEFT has no adapters for transposed
    convolutions and recurrent layers; they are written in the same way, for `load_adapter`.

    Args:
        module: a captured module with adapters.
        directory: made where it is missing.
        name: of the adapter.

    Raises:
        PassError: the module has no adapters.
        ArtifactError: none of that name, the weights are without what the init of another one took out of them, or
            the files can't be written.
    """
    known = names(module)
    if name not in known:
        near = ", ".join(f"'{each}'" for each in nearest_names([name], known))
        raise ArtifactError(f"no adapter is called '{name}'; there are {near}")
    taken = takes_part(module, name)
    if taken is not None:
        raise ArtifactError(
            f"adapter '{name}' is none of the original weights: the weight of '{taken[0].name}' is without what the "
            f"init of adapter '{taken[1]}' took out of it; train '{name}' on a module that is captured anew"
        )
    found: dict[str, Adapter] = {}
    for adapter in adapters(module):
        if name in adapter:
            # Of several uses of one weight the first, which is the weight as a whole where one is that.
            found.setdefault(adapter.slot, adapter)
    root = root_of(module, next(iter(found.values())))
    entries = nested(root, alike([to_entry(root, adapter, name) for adapter in found.values()]))
    beside = _with_tied(root, saved_with(module, name))
    lows = [adapter[name] for adapter in found.values()]
    # PEFT takes no dropout where it adapts a weight as a whole, which it does with all parameters of no layer.
    whole = any(isinstance(adapter, WeightAdapter) for adapter in found.values()) or any(e.parameter for e in entries)
    dropout = 0.0 if whole else max(low.dropout for low in lows)
    config = configuration(root, entries, beside, lows[0].rslora, dropout)
    tensors = write_entries(entries) | write_beside(root, beside, entries)
    columns = {entry.path: entry.columns for entry in entries if entry.columns}
    metadata = {"format": "pt"} | ({SLICES: json.dumps(columns)} if columns else {})
    try:
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata=metadata)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot write the adapter to '{directory}': {error}") from error


def _with_tied(root: nn.Module, beside: Beside) -> Beside:
    """The same with the modules that share a parameter with one of them: from a file each gets its own."""
    held = {id(parameter) for path in beside.modules for parameter in root.get_submodule(path).parameters()}
    sharing = [
        path
        for path, child in root.named_modules(remove_duplicate=False)
        if path and any(id(parameter) in held for parameter in child._parameters.values())
        if not any(f"{path}.".startswith(f"{saved}.") for saved in beside.modules)
    ]
    return replace(beside, modules=(*beside.modules, *sharing))


def load_adapter(module: nn.Module, directory: str | Path, name: str = "default") -> None:
    """Read an adapter that `save_adapter` or PEFT wrote, and put it on the layers that it is for.

    Layers that have no adapter yet get one; the graph is edited in place. The adapter counts and trains at once where
    it is the only one of a layer, else from `set_adapter` on. The first one freezes everything else but the modules
    that are saved with it. All of it is loaded or nothing, but for layers that the model has and does not use.

    Args:
        module: a captured module.
        directory: with `adapter_config.json` and `adapter_model.safetensors`.
        name: to give it.

    Raises:
        ArtifactError: files that are missing or can't be read; keys, shapes or ranks that don't fit; layers that
            the model hasn't; a kind of adapter that fxopt doesn't have. The message says which.
    """
    if not isinstance(module, GraphModule):
        raise ArtifactError(
            f"load_adapter takes a captured module, not a '{type(module).__name__}': "
            "give it fxopt.capture(module, inputs).module"
        )
    if not can_be_called(name):
        raise ArtifactError(f"an adapter can't be called '{name}': take a name without dots that means nothing else")
    settings, tensors = read(directory)
    entries, rest = read_entries(tensors, settings, module)
    Loading(module, name, settings, entries, rest, str(directory)).run()


def show_adapter(directory: str | Path) -> dict[str, Any]:
    """What an adapter is: its options, and name, rank, scale and shapes of each layer, as plain JSON.

    Raises:
        ArtifactError: files that are missing or can't be read.
    """
    settings, tensors = read(directory)
    entries, rest = read_entries(tensors, settings)
    return {
        **{key: getattr(settings, key) for key in ("rank", "alpha", "rslora", "dora", "dropout")},
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "layers": [
            {
                "name": entry.name,
                "rank": entry.rank,
                "scale": entry.scale,
                "a": "x".join(map(str, entry.a.shape)),
                "b": "x".join(map(str, entry.b.shape)),
            }
            for entry in entries.values()
        ],
        "modules_to_save": sorted({key.rpartition(".")[0] for key in rest}),
    }


def read(directory: str | Path) -> tuple[Settings, dict[str, torch.Tensor]]:
    """The settings and the tensors of an adapter.

    Raises:
        ArtifactError: files that are missing or can't be read, or settings that fxopt doesn't have.
    """
    folder = Path(directory)
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise ArtifactError(f"'{folder}' has no '{file}'; an adapter is saved as '{CONFIG}' and '{WEIGHTS}'")
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            columns = json.loads((file.metadata() or {}).get(SLICES, "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ArtifactError(f"cannot read the adapter in '{folder}': {error}") from error
    return replace(to_settings(config, str(folder / CONFIG)), columns=columns), tensors
