"""Several adapters: added, switched, disabled, weighted, one a sample."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fxopt
from fxopt import artifact, capture
from fxopt.errors import FxoptError, PassError
from fxopt.graph import GraphModule
from passes import LoRA
from passes.lora import (
    disable,
    enable,
    load_adapter,
    merge,
    mixed_batch,
    save_adapter,
    set_adapter,
    trainable_parameters,
    unmerge,
    weighted,
)
from passes.lora.adapter import Adapter
from passes.lora.inject import inject
from tests.passes.lora.conftest import randomize
from tests.passes.lora.small import MLP, EmbConv1D, Recurrents


def two(model: nn.Module | None = None, x: torch.Tensor | None = None) -> tuple[GraphModule, torch.Tensor]:
    x = torch.randn(4, 10) if x is None else x
    module = capture((model or MLP()).eval(), (x,)).module
    inject(module, LoRA(rank=2, targets=("*",), adapter="first"))
    inject(module, LoRA(rank=3, targets=("lin0", "words"), adapter="second"))
    randomize(module)
    return module, x


@torch.no_grad()
def outputs(module: GraphModule, x: torch.Tensor, name: str) -> torch.Tensor:
    set_adapter(module, name)
    out: torch.Tensor = module(x)
    return out


def test_added_adapters_share_the_call() -> None:
    module, _ = two()
    found = [child for child in module.modules() if isinstance(child, Adapter)]
    assert [adapter.names for adapter in found] == [("first", "second"), ("first",)]
    assert found[0]["second"].rank == 3


def test_a_layer_right_before_one_that_has_an_adapter_gets_its_own() -> None:
    module = capture(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), (torch.randn(2, 4),)).module
    for name, target in (("first", "1"), ("second", "0")):
        inject(module, LoRA(targets=(target,), adapter=name))
    found = {child.name: child.names for child in module.modules() if isinstance(child, Adapter)}
    assert found == {"1": ("first",), "0": ("second",)}


class TwoModes(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * 2 if self.training else x)


@pytest.mark.parametrize(("name", "by"), [("second", "pass"), ("second", "file"), ("first", "file")])
def test_dora_beside_and_in_the_place_of_an_adapter_without(name: str, by: str, tmp_path: Path) -> None:
    model, x = TwoModes().eval(), torch.randn(4, 10)
    expected = capture(model, (x,)).module
    inject(expected, LoRA(rank=3, dora=True))
    module = capture(model, (x,)).module
    inject(module, LoRA(rank=2, adapter="first"))
    if by == "pass":
        inject(module, LoRA(rank=3, dora=True, adapter="second"))
    else:
        randomize(expected)
        save_adapter(expected, tmp_path)
        load_adapter(module, tmp_path, name)
    set_adapter(module, name)
    assert len(module.graphs) == 2
    for mode in (False, True):
        with torch.random.fork_rng():
            out = module.train(mode)(x)
        assert torch.allclose(out, expected.train(mode)(x), atol=1e-6)


def test_switching_keeps_the_graph_and_chooses_what_trains() -> None:
    module, x = two()
    graph = str(module.graph)
    first, second = (outputs(module, x, name) for name in ("first", "second"))
    assert not torch.equal(first, second)
    assert torch.equal(outputs(module, x, "first"), first)
    assert str(module.graph) == graph
    trains = {id(p) for p in trainable_parameters(module)}
    assert trains == {id(p) for name, p in module.named_parameters() if ".first." in name}


def test_switching_lets_what_is_saved_with_an_adapter_train() -> None:
    layers = [nn.Linear(10, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)]
    module = capture(nn.Sequential(*layers).eval(), (torch.randn(4, 10),)).module
    inject(module, LoRA(rank=2, targets=("0",), adapter="first", modules_to_save=("1", "2")))
    inject(module, LoRA(rank=2, targets=("0",), adapter="second", modules_to_save=("2", "3")))
    for name, saved in (("first", {"1", "2"}), ("second", {"2", "3"}), ("first", {"1", "2"})):
        set_adapter(module, name)
        trains = {path.rpartition(".")[0] for path, each in module.named_parameters() if each.requires_grad}
        assert trains == {f"lora.0.{name}", *saved}


def test_what_is_saved_with_an_adapter_is_known_to_a_later_run(tmp_path: Path) -> None:
    model, x = MLP().eval(), torch.randn(4, 10)
    first = fxopt.optimize(model, x, [LoRA(targets=("lin0",), modules_to_save=("lin1",))], devices=()).module
    again = fxopt.optimize(first, x, "clean", devices=()).module
    save_adapter(again, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["lin1"]


def test_adapters_inside_of_a_module_are_not_saved_with_it(tmp_path: Path) -> None:
    model, x = Recurrents().eval(), torch.randn(2, 4, 6)
    module, fresh = (capture(model, (x,)).module for _ in range(2))
    inject(module, LoRA(rank=2, targets=("lstm", "gru"), modules_to_save=("gru",)))
    randomize(module)
    save_adapter(module, tmp_path)
    load_adapter(fresh, tmp_path)
    assert torch.allclose(fresh(x), module(x), atol=1e-6)


def test_what_is_loaded_trains_and_nothing_else(tmp_path: Path) -> None:
    def trained(module: GraphModule) -> set[str]:
        trains = {id(parameter) for parameter in trainable_parameters(module)}
        return {name for name, parameter in module.named_parameters() if id(parameter) in trains}

    model = nn.Sequential(nn.Linear(10, 4), nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    x = torch.randn(4, 10)
    module = capture(model, (x,)).module
    inject(module, LoRA(rank=2, targets=("0",), modules_to_save=("2",)))
    expected = trained(module)
    save_adapter(module, tmp_path)
    fresh = capture(model, (x,)).module
    load_adapter(fresh, tmp_path)
    assert trained(fresh) == expected == {"lora.0.default.A", "lora.0.default.B", "2.weight", "2.bias"}
    load_adapter(fresh, tmp_path, "second")
    assert trained(fresh) == expected


def test_disabled_it_is_the_model_without_adapters() -> None:
    model = MLP().eval()
    module, x = two(model)
    with torch.no_grad():
        adapted = module(x)
        disable(module)
        assert torch.equal(module(x), model.requires_grad_(False)(x))
        enable(module)
        assert torch.equal(module(x), adapted)


def test_a_weighted_sum() -> None:
    module, x = two()
    weight = module.get_parameter("lin0.weight")
    adapter = module.get_submodule("lora.lin0")
    assert isinstance(adapter, Adapter)
    weighted(module, {"first": 0.5, "second": -2.0})
    expected = weight.double()
    for name, factor in (("first", 0.5), ("second", -2.0)):
        low = adapter[name]
        expected = expected + factor * low.scale * low.B.double() @ low.A.double()
    with torch.no_grad():
        out = module(x)
        merge(module, (x,))
        assert torch.allclose(module.get_parameter("lin0.weight").double(), expected, atol=1e-6)
        assert torch.allclose(module(x), out, atol=1e-5)


@pytest.mark.parametrize("options", [{"dora": True}, {}], ids=["dora behind dora", "dora behind lora"])
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (MLP, torch.randn(4, 10).double()),
        (EmbConv1D, torch.randint(0, 100, (4, 10))),
        (lambda: nn.Sequential(nn.Conv1d(4, 6, 3, groups=2)), torch.randn(2, 4, 9).double()),
    ],
    ids=["mlp", "embedding", "conv"],
)
def test_a_length_is_that_of_the_weight_with_the_adapters_before(
    model: Callable[[], nn.Module], x: torch.Tensor, options: dict[str, bool]
) -> None:
    module = capture(model().double().eval(), (x,)).module
    inject(module, LoRA(rank=2, targets=("*",), adapter="second", dora=True))
    inject(module, LoRA(rank=2, targets=("*",), adapter="first", **options))
    randomize(module)
    weighted(module, {"first": 1.0, "second": 0.5})
    with torch.no_grad():
        out = module(x)
        merge(module)
        assert torch.allclose(module(x), out)


@pytest.mark.parametrize("kind", ["mlp", "embedding"])
def test_a_mixed_batch(kind: str) -> None:
    model, x = (MLP(), torch.randn(5, 10)) if kind == "mlp" else (EmbConv1D(), torch.randint(0, 100, (5, 10)))
    module, x = two(model, x)
    names = ["second", "first", "base", "first", "second"]
    single = {name: outputs(module, x, name) for name in ("first", "second")}
    with torch.no_grad():
        disable(module)
        single["base"] = module(x)
        enable(module)
        with mixed_batch(module, names):
            out = module(x)
    for row, name in enumerate(names):
        assert torch.allclose(out[row], single[name][row], atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: set_adapter(module, "second"),
        lambda module: weighted(module, {"first": 0.5, "second": 2.0}),
        disable,
    ],
)
def test_which_adapters_count_is_kept_with_a_result(change: Callable[[GraphModule], None], tmp_path: Path) -> None:
    model, x = MLP().eval(), torch.randn(4, 10)
    result = fxopt.optimize(model, x, "lora{adapter=first},lora{adapter=second,rank=2}", devices=())
    randomize(result.module)
    change(result.module)
    artifact.save(result, tmp_path / "kept", {})
    again = fxopt.load(tmp_path / "kept", model)
    assert torch.equal(again(x), result.module(x))
    trains, kept = ({n for n, p in each.named_parameters() if p.requires_grad} for each in (result.module, again))
    assert kept == trains
    enable(result.module)
    merge(result.module)
    with pytest.raises(
        PassError, match=r"the weight of 'lin0' holds its adapters; call unmerge\(module\) first, or run"
    ):
        artifact.save(result, tmp_path / "merged", {})


@pytest.mark.parametrize("name", ["default", "second"])
@pytest.mark.parametrize("passes", ["lora{rank=3}", "lora{rank=2,slices=[0-1]}"])
def test_what_a_file_brought_is_kept_with_a_result(passes: str, name: str, tmp_path: Path) -> None:
    model, x = MLP().eval(), torch.randn(4, 10)
    other = capture(model, (x,)).module
    inject(other, LoRA(rank=5, alpha=3.0, modules_to_save=("lin1",), targets=("lin0",)))
    randomize(other)
    save_adapter(other, tmp_path / "file")
    result = fxopt.optimize(model, x, passes, devices=())
    load_adapter(result.module, tmp_path / "file", name)
    set_adapter(result.module, name)
    artifact.save(result, tmp_path / "kept", {})
    again = fxopt.load(tmp_path / "kept", model)
    with torch.no_grad():
        assert torch.equal(again(x), other(x))
    save_adapter(again, tmp_path / "again", name)
    files = (load_file(tmp_path / each / "adapter_model.safetensors") for each in ("file", "again"))
    assert len({frozenset(key for key in file if "lora" not in key) for file in files}) == 1


@pytest.mark.parametrize("passes", ["lora{targets=lin1}", "lora{dora=true,targets=lin1}", "lora", "lora{dora=true}"])
@pytest.mark.parametrize("name", ["default", "second"])
def test_a_graph_that_a_file_made_is_not_kept_with_a_result(passes: str, name: str, tmp_path: Path) -> None:
    model, x = MLP().eval(), torch.randn(4, 10)
    other = capture(model, (x,)).module
    inject(other, LoRA(rank=5, dora=True, targets=("lin0",)))
    save_adapter(other, tmp_path / "file")
    result = fxopt.optimize(model, x, passes, devices=())
    load_adapter(result.module, tmp_path / "file", name)
    if passes == "lora{dora=true}":
        artifact.save(result, tmp_path / "kept", {})
        assert torch.equal(fxopt.load(tmp_path / "kept", model)(x), result.module(x))
        return
    with pytest.raises(PassError, match="no recipe makes the graph again that 'load_adapter' made for 'lin0'"):
        artifact.save(result, tmp_path / "kept", {})


def test_what_can_not_be(tmp_path: Path) -> None:
    module, x = two()
    with pytest.raises(PassError, match="no adapter is called 'third'; there are"):
        set_adapter(module, "third")
    with pytest.raises(PassError, match="no adapter is called 'third'"), mixed_batch(module, ["third"]):
        pass
    with pytest.raises(PassError, match="names 3 samples, 'lin0' got 4"), mixed_batch(module, ["first"] * 3):
        module(x)
    disable(module)
    with pytest.raises(
        PassError, match=r"'lin0' can't be merged: its adapters are disabled, .*; call enable\(module\)"
    ):
        merge(module)
    enable(module)
    save_adapter(module, tmp_path, "first")
    merge(module)
    for change in (
        lambda: set_adapter(module, "first"),
        lambda: disable(module),
        lambda: mixed_batch(module, ["first"] * 4).__enter__(),
        lambda: load_adapter(module, tmp_path, "first"),
    ):
        with pytest.raises(FxoptError, match=r"the weight of 'lin0' holds its adapters; call unmerge\(module\) first"):
            change()
    unmerge(module)
    with pytest.raises(PassError, match="has no adapters; put them in with the pass 'lora'"):
        set_adapter(capture(MLP(), (x,)).module, "first")


class Positioned(nn.Module):
    def __init__(self, positions: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.positions = positions
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(6, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.words(ids) + self.places(self.positions(ids))


@pytest.mark.parametrize(
    ("positions", "has_samples"),
    [
        (lambda ids: torch.arange(ids.shape[1]), False),
        (lambda ids: torch.arange(ids.size()[1], device=ids.device)[None], False),
        (lambda ids: torch.arange(ids.shape[1]).expand(ids.shape[0], -1), True),
        (lambda ids: torch.ones_like(ids).cumsum(1) - 1, True),
    ],
)
def test_a_mixed_batch_where_positions_are_embedded(
    positions: Callable[[torch.Tensor], torch.Tensor], has_samples: bool
) -> None:
    module, x = two(Positioned(positions), torch.randint(0, 20, (2, 6)))
    if not has_samples:
        with pytest.raises(PassError, match="'places' sees no samples"), mixed_batch(module, ["first", "base"]):
            pass
        return
    expected = outputs(module, x, "first")[0]
    with torch.no_grad(), mixed_batch(module, ["first", "base"]):
        assert torch.allclose(module(x)[0], expected, atol=1e-6)


class Turns(nn.Module):
    """Its second layer sees steps before samples."""

    def __init__(self, turn: Callable[[torch.Tensor], torch.Tensor], back: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.turn, self.back = turn, back
        self.first, self.norm, self.second, self.last = (
            nn.Linear(8, 8),
            nn.LayerNorm(8),
            nn.Linear(8, 8),
            nn.Linear(8, 8),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.turn(self.first(x))
        return self.last(self.back(self.second(self.norm(y) + y[:1])))


@pytest.mark.parametrize(
    ("turn", "back", "is_turned"),
    [
        (lambda x: x.transpose(0, 1), lambda x: x.transpose(1, 0), True),
        (lambda x: torch.permute(x, (1, 0, 2)), lambda x: x.permute(-2, 0, 2), True),
        (lambda x: x.transpose(1, 2).transpose(1, 2), lambda x: x, False),
        (lambda x: x.view(2, 4, 2, 4).permute(2, 0, 1, 3)[0].repeat(1, 1, 2), lambda x: x, False),
        (lambda x: x.transpose(0, 1).reshape(4, 2, 8).transpose(0, 1).contiguous(), lambda x: x, False),
        (lambda x: x[None].transpose(0, 1)[:, 0], lambda x: x, False),
        (lambda x: torch.stack([x, x]).transpose(0, 1)[:, 0], lambda x: x, False),
    ],
)
def test_a_mixed_batch_where_samples_are_not_along_the_first_axis(
    turn: Callable[[torch.Tensor], torch.Tensor], back: Callable[[torch.Tensor], torch.Tensor], is_turned: bool
) -> None:
    x = torch.randn(2, 4, 8)
    module = capture(Turns(turn, back).eval(), (x,)).module
    inject(module, LoRA(adapter="first"))
    if is_turned:
        with (
            pytest.raises(PassError, match="'second' sees samples along axis 1"),
            mixed_batch(module, ["first", "base"]),
        ):
            pass
        return
    with torch.no_grad(), mixed_batch(module, ["first", "base"]):
        module(x)


def test_a_whole_weight_takes_no_mixed_batch() -> None:
    x = torch.randn(2, 4, 6)
    module = capture(Recurrents().eval(), (x,)).module
    inject(module, LoRA(targets=("*",)))
    with pytest.raises(PassError, match="adapted as a whole weight"), mixed_batch(module, ["default", "base"]):
        module(x)
