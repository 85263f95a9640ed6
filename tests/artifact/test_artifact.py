"""A result that was saved, loaded onto the original module, computes the same to the bit."""

from __future__ import annotations

import copy
import json
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from fxopt.artifact import load, save
from fxopt.contract import Pass, Promise
from fxopt.errors import ArtifactError
from fxopt.optimize import Result, optimize
from tests.models import TiedHead

REPORTS = {"report.md": "# Report\n", "report.json": "{}\n"}


class Net(nn.Module):
    """Tied weights, a buffer that no state_dict has, and a tensor that is not registered."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.rand(width), persistent=False)
        self.loose = torch.rand(width)

    def forward(self, x, *, add=0.0):
        x = self.bn(self.conv(x)).relu().mean((2, 3)) * self.scale + self.loose
        return {"out": self.second(self.first(x)) + add}


def trained(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    module = Net()
    for _ in range(3):
        module(torch.randn(8, 3, 6, 6))
    return module


def run(module: nn.Module, passes: str, inputs=None, batches: int = 0) -> Result:
    given = {"x": torch.randn(4, 3, 6, 6), "add": 0.5} if inputs is None else inputs
    data = [{"x": torch.randn(4, 3, 6, 6), "add": 0.5} for _ in range(batches)]
    return optimize(module, given, passes, devices=(), calibration_data=data)


class Experts(nn.Module):
    """The sum of the input decides which of two experts runs."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))

    def forward(self, x):
        return self.experts[int(x.sum().item() > 0)](x)


@pytest.mark.parametrize("passes", ["qat", "ptq", "qat,quantize-freeze", "ptq,quantize-freeze"])
@pytest.mark.parametrize("reached", [(1.0, -1.0), (-1.0,)])
def test_quantisers_that_data_reached_beyond_the_example_load(tmp_path, passes, reached):
    data = [torch.full((2, 4), value) for value in reached]
    result = optimize(Experts().eval(), torch.ones(2, 4), passes, devices=(), calibration_data=data)
    save(result, tmp_path / "kept", REPORTS)
    again = load(tmp_path / "kept", Experts().eval())
    for x in torch.randn(8, 2, 4):
        assert torch.equal(again(x), result.module(x))


class Decides(nn.Module):
    """What a layer computes decides whether another one is called at all."""

    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))

    def forward(self, x):
        x = self.first(x)
        return self.second(x) if x.sum().item() > 0 else x


@pytest.mark.parametrize("passes", ["clean", "lora", "sparsify{criterion=wanda}", "qat"])
def test_weights_that_decide_what_is_captured(tmp_path, passes):
    module, other = Decides().eval(), Decides().eval()
    module.first[0].bias.data.fill_(9.0)
    other.first[0].bias.data.fill_(-9.0)
    data = [torch.zeros(2, 4), torch.full((2, 4), -30.0)]
    result = optimize(module, data[0], passes, devices=(), calibration_data=data)
    save(result, tmp_path / "kept", REPORTS)
    again = load(tmp_path / "kept", other)
    for x in data:
        assert torch.equal(again(x), result.module(x))
    assert other.first[0].bias.eq(-9.0).all()


@pytest.mark.parametrize(
    ("passes", "batches"),
    [
        ("", 0),
        ("clean,fuse", 0),
        ("fuse,qat{bits=4}", 0),
        ("qat", 0),
        ("qat,quantize-freeze", 0),
        ("fuse,qat,quantize-freeze", 2),
        ("fuse,ptq,quantize-freeze", 2),
        ("sparsify{criterion=wanda}", 2),
    ],
)
def test_the_outputs_are_equal_to_the_bit(tmp_path, passes, batches):
    result = run(trained().eval(), passes, batches=batches)
    save(result, tmp_path / "kept", REPORTS)
    other = trained(seed=1)
    other.loose = result.captured.module.get_buffer(result.captured.constants[0].name)
    before = copy.deepcopy(other)
    again = load(tmp_path / "kept", other)
    x = torch.randn(2, 3, 9, 9)
    assert torch.equal(again(x, add=0.5)["out"], result.module(x, add=0.5)["out"])
    assert list(again.state_dict()) == list(result.module.state_dict())
    assert not again.training
    assert other.training
    assert all(torch.equal(value, before.state_dict()[key]) for key, value in other.state_dict().items())
    assert torch.equal(other.scale, before.scale)


def test_what_was_trained_afterwards_is_kept_by_saving_again(tmp_path):
    result = run(trained().eval(), "fuse,qat")
    optimizer = torch.optim.SGD(result.module.parameters(), lr=0.1)
    result.module.train()
    result.module(torch.randn(4, 3, 6, 6), add=0.5)["out"].square().sum().backward()
    optimizer.step()
    save(result, tmp_path / "kept")
    again = load(tmp_path / "kept", trained().eval())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(again.eval()(x, add=0.5)["out"], result.module.eval()(x, add=0.5)["out"])


def test_tied_weights_are_written_once_unless_training_rounds_them_apart(tmp_path):
    def prepared():
        torch.manual_seed(0)
        tokens = torch.randint(0, 20, (3, 7))
        return optimize(TiedHead().eval(), tokens, "qat{learned=lsq}", devices=(), calibration_data=[tokens]).module

    tokens = torch.arange(20).view(2, 10)
    for factor, tied in ((1.0, {"head.weight": "embed.weight"}), (1.3, {})):
        module = prepared()
        with torch.no_grad():
            module.get_parameter("head.weight_fake_quant.scale").mul_(factor)
        result = optimize(module, tokens, "quantize-freeze", devices=())
        save(result, tmp_path / str(factor))
        assert json.loads((tmp_path / str(factor) / "recipe.json").read_text())["tied"] == tied
        assert torch.equal(load(tmp_path / str(factor), prepared())(tokens), result.module(tokens))


def test_what_is_written(tmp_path):
    save(run(trained().eval(), "fuse"), tmp_path / "kept", REPORTS)
    assert (tmp_path / "kept" / "report.md").read_text() == "# Report\n"
    recipe = json.loads((tmp_path / "kept" / "recipe.json").read_text())
    assert recipe["spec"] == "fuse"
    assert recipe["passes"][0]["options"]["activations"] is True
    assert recipe["inputs"]["description"] == "x=4x3x6x6 float32, add=0.5"
    assert recipe["versions"]["torch"] == torch.__version__
    assert recipe["tied"] == {"second.weight": "first.weight"}
    assert sorted(entry.name for entry in (tmp_path / "kept").iterdir()) == recipe["files"]


def test_inputs_that_cannot_be_saved_are_asked_for(tmp_path):
    Pair = namedtuple("Pair", "left right")

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, pair):
            return self.fc(pair.left + pair.right)

    pair = Pair(torch.randn(2, 3), torch.randn(2, 3))
    module = Sum().eval()
    result = run(module, "", (pair,))
    save(result, tmp_path / "kept")
    with pytest.raises(
        ArtifactError, match=r"since args\.0 is a 'Pair': give them by `fxopt.load\(directory, module, i"
    ):
        load(tmp_path / "kept", module)
    again = load(tmp_path / "kept", module, inputs=(pair,))
    assert torch.equal(again(pair), result.module(pair))


@dataclass(frozen=True)
class Private(Pass):
    """Is not offered by any entry point."""

    name: ClassVar[str] = "private"
    promise: ClassVar[Promise] = Promise.EXACT

    def run(self, region) -> Iterator:
        return iter(())


def test_a_pass_that_no_spec_can_name_cannot_be_saved(tmp_path):
    result = optimize(trained().eval(), (torch.randn(1, 3, 6, 6),), [Private()], devices=())
    with pytest.raises(ArtifactError, match=r"pass 'private' \(.*Private\) is not installed"):
        save(result, tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("results") / "kept"
    save(run(trained().eval(), "fuse"), path, REPORTS)
    return path


def edit(path: Path, **changes) -> None:
    recipe = json.loads((path / "recipe.json").read_text())
    (path / "recipe.json").write_text(json.dumps({**recipe, **changes}))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: (path / "recipe.json").unlink(), "holds no result of fxopt: there is no 'recipe.json'"),
        (lambda path: (path / "recipe.json").write_text("{"), "recipe.json': Expecting"),
        (lambda path: (path / "recipe.json").write_text("{}"), "is not a recipe of fxopt"),
        (lambda path: (path / "weights.safetensors").unlink(), "weights.safetensors': the result is not complete"),
        (lambda path: (path / "weights.safetensors").write_bytes(b"1"), "cannot read '"),
        (lambda path: (path / "inputs.safetensors").unlink(), "inputs.safetensors': the result is not complete"),
        (lambda path: edit(path, schema="9.0"), "was written in version 9.0 of the recipe, this fxopt reads 2.0"),
        (lambda path: edit(path, spec="gone"), "cannot replay the recipe in '"),
        (lambda path: edit(path, spec="qat"), "on this 'Net' makes another graph than it did (fxopt"),
    ],
)
def test_a_damaged_result_is_refused(tmp_path, kept, harm, message):
    path = tmp_path / "kept"
    path.mkdir()
    for entry in kept.iterdir():
        (path / entry.name).write_bytes(entry.read_bytes())
    harm(path)
    with pytest.raises(ArtifactError) as raised:
        load(path, trained())
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Net(width=16), "of another shape or dtype: "),
        (nn.Sequential(nn.ReLU()), "on this 'Sequential' fails with TypeError"),
        (Net().double(), "on this 'Net' fails with RuntimeError"),
    ],
)
def test_another_module_is_refused(kept, module, message):
    with pytest.raises(ArtifactError) as raised:
        load(kept, module)
    assert message in str(raised.value)


def test_no_directory(tmp_path):
    with pytest.raises(ArtifactError, match="holds no result of fxopt"):
        load(tmp_path / "nothing", Net())
