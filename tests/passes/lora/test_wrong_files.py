"""What is wrong with a file is an error that says it, never an adapter that does nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fxopt import capture
from fxopt.errors import ArtifactError
from fxopt.graph import GraphModule
from passes import LoRA
from passes.lora import load_adapter, save_adapter
from passes.lora.adapter import Adapter
from passes.lora.inject import inject
from tests.passes.lora.conftest import randomize
from tests.passes.lora.small import MLP

PREFIX = "base_model.model."
Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors, dict[str, Any]], Any]


def fresh() -> GraphModule:
    torch.manual_seed(0)
    return capture(MLP().eval(), (torch.randn(2, 10),)).module


def drop(tensors: Tensors, layer: str) -> None:
    for key in [key for key in tensors if layer in key]:
        del tensors[key]


def rename(tensors: Tensors, old: str, new: str) -> None:
    for key in list(tensors):
        tensors[key.replace(old, new)] = tensors.pop(key)


WRONG: dict[str, tuple[Edit, str]] = {
    "prefix": (lambda t, c: rename(t, PREFIX, "model."), "does not begin with 'base_model.model.'"),
    "layer": (lambda t, c: rename(t, "lin0", "lin9"), "for a layer 'lin9' that the model hasn't; nearest: 'lin"),
    "half": (lambda t, c: t.pop(f"{PREFIX}lin0.lora_B.weight"), "has no 'base_model.model.lin0.lora_B.weight'"),
    "missing": (lambda t, c: drop(t, "lin1"), "targets 'lin1' and has no weights for it"),
    "rank": (lambda t, c: c.update(r=5), "'lin0' has an A of rank 3, its configuration says 5"),
    "shape": (
        lambda t, c: t.update({f"{PREFIX}lin0.lora_B.weight": torch.randn(7, 3)}),
        r"factors of shapes \(3, 10\) and \(7, 3\), which don't fit its weight of shape \(20, 10\)",
    ),
    "extra": (lambda t, c: t.update({f"{PREFIX}lin2.weight": torch.randn(2)}), "a tensor 'lin2.weight' that the model"),
    "type": (lambda t, c: c.update(peft_type="IA3"), "of type 'IA3', expected 'LORA'"),
    "dora": (lambda t, c: c.update(use_dora=True), "lin0.lora_magnitude_vector', which 'use_dora' needs"),
    "option": (lambda t, c: c.update(layer_replication=[[0, 1]]), "uses 'layer_replication'"),
    "init": (
        lambda t, c: c.update(init_lora_weights="pissa_niter_4"),
        "is for what init 'pissa_niter_4' left of the weights, not for the original ones: save it in PEFT with",
    ),
    "no rank": (lambda t, c: c.pop("r"), "no configuration of an adapter"),
    "empty": (lambda t, c: drop(t, "lin"), "holds no tensors of an adapter"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(tmp_path: Path, name: str) -> None:
    module = fresh()
    inject(module, LoRA(rank=3))
    randomize(module)
    save_adapter(module, tmp_path)
    tensors, config = load_file(tmp_path / "adapter_model.safetensors"), tmp_path / "adapter_config.json"
    options = json.loads(config.read_text())
    edit, message = WRONG[name]
    edit(tensors, options)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config.write_text(json.dumps(options))
    loaded = fresh()
    before = str(loaded.graph)
    with pytest.raises(ArtifactError, match=message):
        load_adapter(loaded, tmp_path)
    assert str(loaded.graph) == before
    assert not any(isinstance(child, Adapter) for child in loaded.modules())


def test_missing_files_and_modules(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="has no 'adapter_config\\.json'"):
        load_adapter(fresh(), tmp_path)
    with pytest.raises(ArtifactError, match="takes a captured module, not a 'MLP'"):
        load_adapter(MLP(), tmp_path)
    module = fresh()
    inject(module, LoRA())
    with pytest.raises(ArtifactError, match="no adapter is called 'other'; there are 'default'"):
        save_adapter(module, tmp_path, "other")


@pytest.mark.parametrize("name", ["v1.0", "", "name", "forward", "base"])
def test_a_name_that_no_adapter_can_have(tmp_path: Path, name: str) -> None:
    module = fresh()
    inject(module, LoRA())
    save_adapter(module, tmp_path)
    with pytest.raises(ArtifactError, match=f"an adapter can't be called '{name}'"):
        load_adapter(module, tmp_path, name)


def test_a_second_adapter_from_a_file(tmp_path: Path) -> None:
    module = fresh()
    inject(module, LoRA(rank=3))
    randomize(module)
    save_adapter(module, tmp_path)
    load_adapter(module, tmp_path, "again")
    adapter = module.get_submodule("lora.lin0")
    assert isinstance(adapter, Adapter)
    assert adapter.names == ("default", "again")
    assert adapter.active == (("default", 1.0),)
    assert torch.equal(adapter["again"].A, adapter["default"].A)


def hooked() -> MLP:
    model = MLP()
    model.lin0.register_forward_hook(lambda module, args, out: out * 2)
    return model


class Penalised(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * self[0].weight.norm()


@pytest.mark.parametrize(
    ("wanted", "model", "x", "message"),
    [
        (MLP, hooked, torch.randn(2, 10), "is for 'lin0', which can't be adapted: it has a forward hook"),
        (
            lambda: nn.Sequential(nn.Conv1d(4, 4, 3)),
            lambda: Penalised(nn.Conv1d(4, 4, 3)),
            torch.randn(2, 4, 9),
            "is for '0', which can't be adapted: it is read as a 'conv1d' too",
        ),
    ],
    ids=["hook", "two forms"],
)
def test_a_layer_of_the_model_that_can_not_be_adapted(
    wanted: Callable[[], nn.Module], model: Callable[[], nn.Module], x: torch.Tensor, message: str, tmp_path: Path
) -> None:
    module = capture(wanted().eval(), (x,)).module
    inject(module, LoRA(rank=3, targets=("*",)))
    save_adapter(module, tmp_path)
    loaded = capture(model().eval(), (x,)).module
    before = str(loaded.graph)
    with pytest.raises(ArtifactError, match=message):
        load_adapter(loaded, tmp_path)
    assert str(loaded.graph) == before


def test_files_are_for_the_original_weights_and_not_for_what_an_init_left_of_them(tmp_path: Path) -> None:
    module = fresh()
    inject(module, LoRA(rank=3, init="pissa", adapter="first"))
    randomize(module)
    save_adapter(module, tmp_path, "first")
    left = "the weight of 'lin0' is without what the init of adapter 'first' took out of it"
    with pytest.raises(ArtifactError, match=f"is for the original weights: {left.replace('the weight', 'that', 1)}"):
        load_adapter(module, tmp_path, "first")
    inject(module, LoRA(rank=3, adapter="second"))
    with pytest.raises(ArtifactError, match=f"adapter 'second' is none of the original weights: {left}"):
        save_adapter(module, tmp_path, "second")
