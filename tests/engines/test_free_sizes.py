"""What engines that export give for sizes that only a second export leaves free."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxopt
from fxopt import Inputs
from fxopt.engines.contract import Built, Engine, Sizes
from fxopt.engines.lower import build
from fxopt.errors import EngineError
from passes import PTQ, Fuse, QuantizeFreeze
from tests.engines.test_contract import assert_agree
from tests.engines.test_others import EXPORTING, needs

_LONGEST = 12


class Encoder(nn.Module):
    """Tokens with places and a mask, of which attention makes as many vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(20, 8), nn.Embedding(_LONGEST, 8)
        self.qkv, self.out, self.norm = nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        batch, length = ids.shape
        x: torch.Tensor = self.tokens(ids) + self.places(torch.arange(length))
        q, k, v = (part.view(batch, length, 2, 4).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, None if mask is None else mask[:, None, None].bool())
        mixed: torch.Tensor = self.norm(x + self.out(attended.transpose(1, 2).reshape(batch, length, 8)))
        return mixed


def sentences(batch: int, length: int) -> Inputs:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, length // 2 + 1 :] = 0
    return Inputs((torch.randint(0, 20, (batch, length)),), {"mask": mask})


class Segmenter(nn.Module):
    """An image, of which it makes one as large."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, 2, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(self.body(x), size=x.shape[-2:], mode="bilinear", align_corners=False)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, int], Inputs]]] = {
    "a longer or shorter sequence": (Encoder, sentences),
    "a larger or smaller image": (Segmenter, lambda batch, size: Inputs((torch.randn(batch, 3, size + 2, 3 * size),))),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("engine", EXPORTING)
def test_runs_sizes_that_the_example_does_not_have(engine: str, name: str) -> None:
    make, inputs = MODELS[name]
    model = make().eval()
    executable = fxopt.lower(model, inputs(2, 6), engine)
    assert not executable.reasons
    for batch, size in ((2, 6), (2, 9), (1, 4), (3, 11), (2, 9)):
        given = inputs(batch, size)
        assert_agree(given.call(executable), given.call(model).detach())


@pytest.mark.parametrize("engine", EXPORTING)
def test_copies_and_new_weights_run_other_sizes_too(engine: str) -> None:
    model, x = nn.Linear(4, 3).eval(), torch.randn(2, 7, 4)
    executable = fxopt.lower(model, torch.randn(2, 5, 4), engine)
    assert_agree(executable(x), model(x).detach())
    assert executable.state_dict().keys() == {"module.weight", "module.bias"}
    for made in (copy.deepcopy(executable), pickle.loads(pickle.dumps(executable))):
        assert_agree(made(x), model(x).detach())
    other = nn.Linear(4, 3)
    executable.load_state_dict({f"module.{name}": value for name, value in other.state_dict().items()})
    assert_agree(executable(x), other(x).detach())


@pytest.mark.parametrize("engine", EXPORTING)
def test_what_the_module_does_not_take_is_refused(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = Encoder().eval()
    executable = fxopt.lower(model, sentences(2, 6), engine)
    for _ in range(2):
        with pytest.raises(
            EngineError, match=r"the module itself raises IndexError for 2x13 int64.*: index out of range"
        ):
            sentences(2, _LONGEST + 1).call(executable)
    assert capsys.readouterr().err == ""
    given = sentences(2, _LONGEST)
    assert_agree(given.call(executable), given.call(model).detach())


class Deciding(nn.Module):
    """Does something else where a sequence is long."""

    def __init__(self, give: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.give = give

    def forward(self, x: torch.Tensor) -> Any:
        return self.give(x)


DECIDING: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "a branch": (lambda x: x * 2 if x.shape[1] > 6 else x + 1, r"x.shape\[1\] <= 6"),
    "a number in a tensor": (lambda x: x[:, :1] + (x.shape[1] if x.shape[1] % 2 else 0), r"x.shape\[1\] % 2"),
    "a size to compute with": (lambda x: x / math.log(1 + x.shape[1]), "does not give what the module gives for 2x7"),
    "a number beside a tensor": (lambda x: Sized(x * 2, x.shape[1]), "does not give what the module gives for 2x7"),
}


class Sized:
    """A tensor and how long it is."""

    def __init__(self, values: torch.Tensor, length: int) -> None:
        self.values, self.length = values, length


@pytest.mark.parametrize("name", DECIDING)
@pytest.mark.parametrize("engine", EXPORTING)
def test_sizes_on_which_the_module_decides_otherwise_are_refused(engine: str, name: str) -> None:
    give, said = DECIDING[name]
    executable = fxopt.lower(Deciding(give).eval(), torch.randn(2, 4), engine)
    for _ in range(2):
        with pytest.raises(EngineError, match=f"{said}.*lower the module again") as caught:
            executable(torch.randn(2, 7))
    assert ("dimension 1 of input 0 stays 4" in str(caught.value)) is (name == "a size to compute with")
    if "does not give" not in said:
        x = torch.randn(3, 2)
        assert_agree(executable(x), give(x))


def test_a_saved_file_leaves_those_sizes_free_where_the_option_says_so(tmp_path: Path) -> None:
    needs("onnxruntime")
    import onnxruntime

    model = Encoder().eval()
    fxopt.lower(model, sentences(2, 6), "onnxruntime{free=all}").save(tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    given = sentences(3, 9)
    names = [each.name for each in session.get_inputs()]
    (found,) = session.run(None, {name: each.numpy() for name, each in zip(names, given.tensors, strict=True)})
    assert_agree(torch.from_numpy(found), given.call(model).detach())


@pytest.mark.parametrize("engine", EXPORTING)
def test_a_quantised_module_runs_on_integers_at_other_sizes_too(engine: str) -> None:
    model = Segmenter().eval()
    inputs = MODELS["a larger or smaller image"][1]
    passes = [Fuse(), PTQ(target=engine), QuantizeFreeze()]
    batches = [inputs(2, 6).args[0] for _ in range(4)]
    frozen = fxopt.optimize(model, inputs(2, 6), passes, devices=(), calibration_data=batches).module
    executable, given = fxopt.lower(frozen, inputs(2, 6), engine), inputs(3, 9)
    assert_agree(given.call(executable), given.call(frozen).detach(), 0.1)


class OnlyBatches(Engine):
    """Stands in for an engine that exports, and can't leave all sizes free."""

    name = "batches"
    sizes = Sizes.BATCH
    frees = 0

    def build(self, module: Any, inputs: Inputs, choices: Any) -> Built:
        return Built(module)

    def freed(self) -> Engine | None:
        type(self).frees += 1
        return Stuck()


class Stuck(OnlyBatches):
    def build(self, module: Any, inputs: Inputs, choices: Any) -> Built:
        raise EngineError("torch cannot export one with free sizes")


def test_what_has_no_form_with_free_sizes_says_so_and_is_not_tried_again() -> None:
    executable = build(OnlyBatches(), nn.Linear(4, 3).eval(), Inputs((torch.randn(2, 5, 4),)))
    for _ in range(2):
        with pytest.raises(EngineError, match=r"only the batch size may differ.*, since torch cannot export one"):
            executable(torch.randn(2, 6, 4))
    assert OnlyBatches.frees == 1
