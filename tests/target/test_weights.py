"""Weights: all of them or none, and the keys that do not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import nn

from fxopt.errors import LoadError
from fxopt.target import load, load_weights


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.table.weight


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": state},
        lambda state: {f"module.{key}": value for key, value in state.items()},
    ],
)
def test_a_saved_state_dict(tmp_path, wrap):
    trained, module = net(), net()
    torch.save(wrap(trained.state_dict()), tmp_path / "w.pt")
    notes = load_weights(module, tmp_path / "w.pt")
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in trained.state_dict().items())
    assert all("took the prefix 'module.' off" in note for note in notes)


def test_safetensors(tmp_path):
    trained, module = net(), net()
    save_file(trained.state_dict(), tmp_path / "w.safetensors")
    load_weights(module, tmp_path / "w.safetensors")
    assert torch.equal(trained[0].weight, module[0].weight)


def test_tied_weights_need_one_key_only(tmp_path):
    trained, module = Tied(), Tied()
    save_model(trained, str(tmp_path / "w.safetensors"))
    load_weights(module, tmp_path / "w.safetensors")
    assert module.head.weight is module.table.weight
    assert torch.equal(trained.table.weight, module.table.weight)


def test_a_tied_weight_takes_no_two(tmp_path):
    module = Tied()
    torch.save({**Tied().state_dict(), "head.weight": torch.zeros(5, 3)}, tmp_path / "w.pt")
    with pytest.raises(LoadError, match=r"1 one with another weight in the model and not in the file: head\.weight"):
        load_weights(module, tmp_path / "w.pt")


class Counted(nn.Linear):
    """Keeps more than tensors."""

    steps = 0

    def get_extra_state(self):
        return {"steps": self.steps}

    def set_extra_state(self, state):
        self.steps = state["steps"]


def test_what_a_module_keeps_beside_tensors(tmp_path):
    trained, module = Counted(2, 2), Counted(2, 2)
    trained.steps = 7
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    load_weights(module, tmp_path / "w.pt")
    assert module.steps == 7
    load_weights(nn.Linear(2, 2), tmp_path / "w.pt")


def test_lazy_parameters(tmp_path):
    trained, module = nn.Linear(3, 2), nn.LazyLinear(2)
    torch.save(trained.state_dict(), tmp_path / "w.pt")
    load_weights(module, tmp_path / "w.pt")
    assert torch.equal(module(torch.ones(1, 3)), trained(torch.ones(1, 3)))


def test_a_mismatch_lists_the_keys_and_loads_nothing(tmp_path):
    state = net().state_dict()
    state["2.weight"] = state.pop("0.weight")
    state["0.bias"] = torch.zeros(5)
    save_file(state, tmp_path / "w.safetensors")
    module = net()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(LoadError) as raised:
        load_weights(module, tmp_path / "w.safetensors")
    message = str(raised.value)
    assert "are not those of 'Sequential'" in message
    assert "1 missing: 0.weight" in message
    assert "1 unexpected: 2.weight" in message
    assert "1 of another shape: 0.bias is 5, expected 4" in message
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in before.items())


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["config.json", "model.safetensors", "optimizer.pt"], ", such as '{directory}/model.safetensors'"),
        (["config.json"], "expected a file, safetensors or a saved state_dict"),
    ],
)
def test_a_directory_of_weights_says_which_file_to_give(tmp_path, files, said):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(LoadError) as raised:
        load_weights(net(), tmp_path)
    assert str(raised.value).startswith(f"'{tmp_path}' is a directory")
    assert str(raised.value).endswith(said.format(directory=tmp_path))


def test_long_lists_are_cut(tmp_path):
    save_file({f"k{i}": torch.zeros(1) for i in range(20)}, tmp_path / "w.safetensors")
    with pytest.raises(LoadError, match=r"20 unexpected: k0, .*, and 12 more"):
        load_weights(net(), tmp_path / "w.safetensors")


def write_pickle(path: Path) -> None:
    torch.save({"model": net()}, path)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("w.pt", lambda path: None, "there is no file"),
        ("w.safetensors", lambda path: path.write_bytes(b"rubbish"), "as safetensors: "),
        ("w.pt", lambda path: path.write_bytes(b"rubbish"), "w.pt' "),
        ("w.pt", lambda path: path.write_bytes(b""), "w.pt' "),
        ("w.pt", write_pickle, "holds more than tensors, or is damaged, and is not opened since it could run code"),
        ("w.pt", lambda path: torch.save([1], path), "holds a list: expected a state_dict"),
    ],
)
def test_files_that_are_no_weights(tmp_path, name, make, message):
    make(tmp_path / name)
    with pytest.raises(LoadError) as raised:
        load_weights(net(), tmp_path / name)
    assert message in str(raised.value)


def test_a_target_takes_weights(write, tmp_path):
    write("")
    save_file({"fc.weight": torch.zeros(4, 3), "fc.bias": torch.ones(4)}, tmp_path / "w.safetensors")
    module = load("model.py", weights=tmp_path / "w.safetensors").module
    assert module(torch.randn(2, 3)).tolist() == [[1.0] * 4] * 2
