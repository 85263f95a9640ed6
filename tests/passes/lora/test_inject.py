"""lora: where adapters go, that they change nothing at first and something later, and what trains."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxopt
from fxopt import capture, spec
from fxopt.contract import Change, Skip
from fxopt.errors import PassError, SpecError
from fxopt.relative_error import relative_error
from passes import LoRA
from passes.lora import merge, trainable_parameters, unmerge
from passes.lora.adapter import Adapter, LayerAdapter
from passes.lora.inject import inject
from tests.passes.lora.conftest import randomize
from tests.passes.lora.small import (
    MHA,
    MLP,
    AlsoAWhole,
    ConvNet,
    EmbConv1D,
    Functional,
    FusedQKV,
    Mixture,
    MLPOnParameters,
    Opaque,
    Recurrents,
    Tied,
    TiedByFunction,
    TwoNames,
    floats,
    ints,
)

Case = tuple[Callable[[], nn.Module], Callable[[], Tensor], list[str]]


class Transposed(nn.Module):
    def __init__(self, dims: int, **options: Any):
        super().__init__()
        self.up = getattr(nn, f"ConvTranspose{dims}d")(4, 6, 3, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


def one_conv(dims: int, **options: Any) -> Callable[[], nn.Module]:
    kind = getattr(nn, f"Conv{dims}d")
    return lambda: nn.Sequential(kind(4, 6, 3, **options))


CASES: dict[str, Case] = {
    "linear": (MLP, floats(5, 10), ["lin0", "lin1"]),
    "conv1d": (one_conv(1, stride=2), floats(2, 4, 9), ["0"]),
    "dilation": (one_conv(2, dilation=2), floats(2, 4, 9, 9), ["0"]),
    "circular": (one_conv(2, padding=1, padding_mode="circular"), floats(2, 4, 9, 9), ["0"]),
    "reflect": (one_conv(1, padding=2, padding_mode="reflect"), floats(2, 4, 9), ["0"]),
    "same": (one_conv(2, padding="same", dilation=2), floats(2, 4, 9, 9), ["0"]),
    "groups": (one_conv(2, groups=2), floats(2, 4, 9, 9), ["0"]),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, groups=4)), floats(2, 4, 9, 9), ["0"]),
    "conv3d": (one_conv(3), floats(2, 4, 5, 5, 5), ["0"]),
    "transposed 1d": (lambda: Transposed(1, stride=2, output_padding=1), floats(2, 4, 5), ["up"]),
    "transposed 2d": (lambda: Transposed(2, groups=2, padding=1, dilation=2), floats(2, 4, 5, 5), ["up"]),
    "transposed 3d": (lambda: Transposed(3, stride=2), floats(2, 4, 3, 3, 3), ["up"]),
    "embedding": (EmbConv1D, ints(3, 10, high=100), ["emb", "conv1d", "lin0"]),
    "attention": (MHA, floats(4, 3, 10), ["mha", "mha.out_proj", "lin0"]),
    "parameters": (MLPOnParameters, floats(5, 10), ["lin0", "lin1"]),
    "functional": (Functional, ints(3, 7, high=10), ["mixed", "table", "linear", "product", "kernel"]),
    "recurrent": (
        Recurrents,
        floats(2, 4, 6),
        [f"lstm.weight_{part}_l{layer}{side}" for layer in (0, 1) for side in ("", "_reverse") for part in ("ih", "hh")]
        + ["gru.weight_ih_l0", "gru.weight_hh_l0"],
    ),
    "experts": (
        lambda: nn.Sequential(Mixture(False), Mixture(True)),
        floats(5, 8),
        ["0.up", "0.down", "1.up", "1.down"],
    ),
    "tied": (Tied, ints(3, 7), ["embed", "body", "head"]),
    "tied by a function": (TiedByFunction, ints(3, 7), ["embed", "body"]),
    "also a whole": (AlsoAWhole, floats(3, 8), ["enc"]),
    "two names": (TwoNames, floats(3, 8), ["first", "first"]),
    "opaque": (Opaque, floats(3, 8), ["head", "gate.left", "gate.right"]),
    "transformer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        floats(2, 5, 8),
        ["self_attn", "self_attn.out_proj", "linear1", "linear2"],
    ),
}
every = pytest.mark.parametrize("name", CASES)


def with_adapters(name: str, **options: Any) -> tuple[nn.Module, fxopt.graph.GraphModule, Tensor, list[Change | Skip]]:
    build, example, _ = CASES[name]
    model, x = build().eval(), example()
    module = capture(model, (x,)).module
    found = inject(module, LoRA(rank=3, targets=("*",), **options))
    return model, module, x, list(found)


@every
def test_goes_everywhere_and_changes_nothing(name: str) -> None:
    model, module, x, found = with_adapters(name)
    expected = CASES[name][2]
    changed = sorted({item.where for item in found[:-1] if isinstance(item, Change)})
    assert changed == sorted(set(expected)) or name in ("two names", "transformer")
    assert not [item for item in found if isinstance(item, Skip)]
    with torch.no_grad():
        assert torch.equal(module(x), model.requires_grad_(False)(x))
    assert set(model.state_dict()) <= set(module.state_dict())


@every
def test_an_adapter_has_an_effect_and_merges(name: str) -> None:
    _, module, x, _ = with_adapters(name)
    with torch.no_grad():
        before = module(x)
        randomize(module)
        adapted = module(x)
        scale = adapted.abs().max()
        assert (adapted - before).abs().max() > 1e-3 * scale
        state = {key: value.clone() for key, value in module.state_dict().items()}
        merge(module, (x,))
        assert (module(x) - adapted).abs().max() <= 5e-6 * scale
        unmerge(module)
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
        assert torch.equal(module(x), adapted)


@every
def test_each_adapter_has_an_effect_of_its_own(name: str) -> None:
    build, example, _ = CASES[name]
    model, x = build().eval(), example()
    for site in dict.fromkeys(CASES[name][2]):
        if site == "self_attn":
            continue
        module = capture(model, (x,)).module
        inject(module, LoRA(rank=3, targets=(f"re:{site}",)))
        with torch.no_grad():
            before = module(x)
            randomize(module)
            same = torch.equal(module(x), before)
        assert same is (name == "opaque" and site == ("gate.right" if x.sum() > 0 else "gate.left"))


@every
@pytest.mark.parametrize("options", [{"dora": True}, {"rslora": True, "alpha": 5.0}, {"init": "gaussian"}], ids=str)
def test_variants_start_equal_and_merge(name: str, options: dict[str, Any]) -> None:
    model, module, x, _ = with_adapters(name, **options)
    with torch.no_grad():
        expected = model.requires_grad_(False)(x)
        assert (module(x) - expected).abs().max() <= (1e-6 if "dora" in options else 0)
        randomize(module)
        adapted = module(x)
        merge(module)
        assert (module(x) - adapted).abs().max() <= 2e-5 * adapted.abs().max()


@pytest.mark.parametrize(
    "name", ["linear", "dilation", "transposed 1d", "embedding", "attention", "recurrent", "two names"]
)
@pytest.mark.parametrize("init", ["orthogonal", "pissa", "olora"])
def test_inits_keep_the_outputs(name: str, init: Any) -> None:
    model, module, x, _ = with_adapters(name, init=init)
    with torch.no_grad():
        assert (module(x) - model(x)).abs().max() <= 1e-5 * model(x).abs().max()


def test_pissa_takes_the_largest_part() -> None:
    model, module, _, _ = with_adapters("linear", init="pissa")
    left = torch.linalg.svdvals(module.get_parameter("lin0.weight"))
    assert torch.allclose(left[: 10 - 3], torch.linalg.svdvals(model.get_parameter("lin0.weight"))[3:], atol=1e-5)


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
@pytest.mark.parametrize("passes", ["qat", "sparsify{amount=0.5}"])
def test_no_init_takes_a_part_out_of_a_weight_that_is_masked_or_rounded(passes: str, init: str) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(3, 8)
    with pytest.raises(PassError, match=r"'0' stays: its weight is masked or fake-quantised.*put 'lora' before"):
        fxopt.optimize(model, x, f"{passes},lora{{init={init}}}", devices=(), calibration_data=[x])
    assert fxopt.optimize(model, x, f"lora{{init={init}}},{passes}", devices=(), calibration_data=[x]).ledger


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("linear", "lin0", "init '{}' would change its weight, which adapter 'first' is for"),
        ("tied", "head", "its weight is tied and init '{}' would change it elsewhere"),
    ],
)
def test_no_init_takes_a_part_out_of_a_weight_that_another_adapter_is_for(
    name: str, target: str, reason: str, init: Any
) -> None:
    _, module, x, _ = with_adapters(name, adapter="first")
    if name == "tied":
        module = capture(CASES[name][0]().eval(), (x,)).module
        inject(module, LoRA(targets=("embed",), adapter="first"))
    randomize(module)
    expected = module(x)
    with pytest.raises(PassError, match=f"no layer that can be adapted; '{target}' stays: {reason}".format(init)):
        inject(module, LoRA(targets=(target,), adapter="second", init=init))
    assert torch.equal(module(x), expected)


def test_loftq_leaves_a_weight_of_few_levels_and_adapts_the_rest() -> None:
    model, module, _, _ = with_adapters("linear", init="loftq")
    weight, original = (m.get_parameter("lin0.weight").detach() for m in (module, model))
    assert all(len(row.unique()) <= 15 for row in weight)
    adapter = module.get_submodule("lora.lin0")
    assert isinstance(adapter, Adapter)
    assert (adapter.folded(weight) - original).norm() < (weight - original).norm()


def test_scale() -> None:
    for options, scale in (({"alpha": 6.0}, 2), ({}, 1), ({"alpha": 6.0, "rslora": True}, 6 / 3**0.5)):
        _, module, _, _ = with_adapters("linear", **options)
        assert module.get_submodule("lora.lin0")["default"].scale == pytest.approx(scale)  # type: ignore[index]


def test_only_adapters_train() -> None:
    _, module, x, found = with_adapters("linear", modules_to_save=("lin1",))
    names = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    adapters = {f"lora.{layer}.default.{factor}" for layer in ("lin0", "lin1") for factor in "AB"}
    assert names == adapters | {"lin1.weight", "lin1.bias"}
    total = sum(p.numel() for p in module.parameters())
    trainable = sum(p.numel() for p in trainable_parameters(module))
    assert isinstance(found[-1], Change)
    assert f"{trainable} of {total} parameters train" in found[-1].what
    optimizer = torch.optim.SGD(trainable_parameters(module), 0.5)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    for _ in range(2):
        module.train()(x).square().sum().backward()
        optimizer.step()
    changed = {key for key, value in module.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == names


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(10, 4))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.table, padding_idx=0)


@pytest.mark.parametrize("model", [lambda: nn.Sequential(nn.Embedding(10, 4, padding_idx=0)), Padded])
@pytest.mark.parametrize("dora", [False, True])
def test_what_stands_for_padding_does_not_move(model: Callable[[], nn.Module], dora: bool) -> None:
    plain, ids = model(), torch.tensor([[0, 1, 2]])
    with torch.no_grad():
        next(plain.parameters())[0] = 0
    module = capture(plain, (ids,)).module
    inject(module, LoRA(targets=("*",), dora=dora))
    optimizer = torch.optim.SGD(trainable_parameters(module), 0.1)
    for _ in range(3):
        module(ids).sum().backward()
        optimizer.step()
    assert module(ids)[0, 0].abs().max() == 0
    assert not torch.equal(module(ids), plain(ids))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(4, 3), torch.randn(2, 4)),
        (nn.Conv2d(4, 3, 3), torch.randn(2, 4, 5, 5)),
        (nn.ConvTranspose2d(4, 3, 3), torch.randn(2, 4, 5, 5)),
        (nn.Embedding(10, 4), torch.tensor([[1, 2]])),
    ],
    ids=lambda value: type(value).__name__,
)
def test_dora_trains_a_layer_that_starts_at_zero(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        next(layer.parameters()).zero_()
    module = capture(nn.Sequential(layer), (x,)).module
    before = module(x).detach()
    inject(module, LoRA(targets=("*",), dora=True))
    assert torch.equal(module(x), before)
    optimizer = torch.optim.Adam(trainable_parameters(module), 0.1)
    for _ in range(3):
        module(x).sum().backward()
        optimizer.step()
    found = module(x).detach()
    assert found.isfinite().all() and not torch.equal(found, before)
    merge(module)
    assert torch.allclose(module(x), found, atol=1e-5)


def test_training_and_inference_agree() -> None:
    for name in CASES:
        _, module, x, _ = with_adapters(name)
        randomize(module)
        with torch.no_grad():
            expected = module(x)
        assert (module(x) - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "without"), [("attention", ["mha", "mha.out_proj"]), ("embedding", ["emb"]), ("linear", [])]
)
def test_where_nothing_can_be_dropped_it_says_so(name: str, without: list[str]) -> None:
    _, module, _x, found = with_adapters(name, dropout=0.5)
    assert [item.where for item in found if isinstance(item, Change) and "without dropout" in item.what] == without
    drops = {child.name for child in module.modules() if isinstance(child, Adapter) and child["default"].dropout}
    assert drops == set(CASES[name][2]) - set(without)


def test_shared_weights_stay_shared() -> None:
    _, module, x, _ = with_adapters("tied")
    assert module.get_submodule("lora.embed.default") is module.get_submodule("lora.head.default")
    randomize(module)
    merge(module, (x,))
    assert module.get_parameter("embed.weight") is module.get_parameter("head.weight")


class Stored(nn.Module):
    """Its weight is scaled before it is one."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)
        self.scale = nn.Parameter(torch.rand(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype) * self.scale)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_weight_that_is_stored_in_few_bits_is_a_skip(dtype: torch.dtype) -> None:
    model = nn.Sequential(Stored(dtype), nn.Linear(4, 4)).eval()
    ledger = fxopt.optimize(model, torch.randn(2, 4), [LoRA(targets=("0", "1"))], devices=()).ledger
    kind = str(dtype).removeprefix("torch.")
    assert [(skip.where, skip.reason) for skip in ledger.entries[0].skips] == [
        ("0", f"its weight is stored as {kind}, which no update can be added to")
    ]
    assert [change.where for change in ledger.entries[0].changes][:-1] == ["1"]


def test_uses_that_no_one_update_fits_are_a_skip() -> None:
    class Penalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * self.conv.weight.norm()

    module = capture(Penalised(), (torch.randn(2, 4, 9),)).module
    (skip,) = LoRA(targets=("*",)).run(fxopt.graph.Program(module).regions[0])
    assert isinstance(skip, Skip)
    assert skip.reason == "it is read as a 'conv1d' too, whose update has another form"


@pytest.mark.parametrize("targets", ["all-linear", "0", "op:linear"])
def test_a_layer_that_is_meant_and_left_alone_is_listed(targets: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Conv1d(2, 2, 1), nn.Linear(4, 4)).eval()
    for layer in model[:2]:
        layer.register_forward_hook(lambda module, args, out: out * 2)
    result = fxopt.optimize(model, torch.randn(2, 4), [LoRA(targets=(targets, "2"))], devices=())
    assert [(skip.where, skip.reason) for skip in result.ledger.entries[0].skips] == [
        ("0", "it has a forward hook, which may see or change its values")
    ]


def test_one_module_has_one_adapter() -> None:
    _, module, _, _ = with_adapters("two names")
    assert sum(isinstance(child, Adapter) for child in module.modules()) == 1


@pytest.mark.parametrize("training", [False, True])
def test_a_graph_for_each_mode_has_the_same_adapters(training: bool) -> None:
    class TwoModes(MLP):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * 2 if self.training else x)

    x = torch.randn(4, 10)
    module = capture(TwoModes().train(training), (x,)).module
    inject(module, LoRA(targets=("*",)))
    assert len(module.graphs) == 2
    assert all(child.training is training for child in module.modules())
    assert sum(isinstance(child, Adapter) for child in module.modules()) == 2
    randomize(module)
    merge(module)


class TestTargets:
    def adapted(self, targets: tuple[str, ...], model: nn.Module | None = None, **options: Any) -> list[str]:
        module = capture(model or CASES["embedding"][0](), (CASES["embedding"][1](),)).module
        inject(module, LoRA(targets=targets, **options))
        return sorted(child.name for child in module.modules() if isinstance(child, Adapter))

    @pytest.mark.parametrize(
        ("targets", "expected"),
        [
            (("all-linear",), ["conv1d", "lin0"]),
            (("*",), ["conv1d", "emb", "lin0"]),
            (("lin*", "emb"), ["emb", "lin0"]),
            (("re:(emb|conv1d)",), ["conv1d", "emb"]),
            (("op:embedding",), ["emb"]),
            (("shape:100x*",), ["emb"]),
            (("op:linear", "shape:5x1"), ["conv1d", "lin0"]),
        ],
    )
    def test_by_name_operator_and_shape(self, targets: tuple[str, ...], expected: list[str]) -> None:
        assert self.adapted(targets) == expected

    def test_ends_of_names(self) -> None:
        model = nn.ModuleDict({"a": MLP(), "b": MLP()})

        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.blocks = model

            def forward(self, x: Tensor) -> Tensor:
                return self.blocks["a"](x) + self.blocks["b"](x)

        module = capture(Both(), (torch.randn(2, 10),)).module
        inject(module, LoRA(targets=("lin0",), exclude=("a.lin0",), rank_pattern={"b.lin0": 2}))
        found = [child for child in module.modules() if isinstance(child, Adapter)]
        assert [(each.name, each["default"].rank) for each in found] == [("blocks.b.lin0", 2)]

    def test_exclude_and_patterns(self) -> None:
        assert self.adapted(("*",), exclude=("emb",), alpha_pattern={"op:linear": 4.0}) == ["conv1d", "lin0"]

    def test_nothing_is_an_error_that_names_the_nearest(self) -> None:
        with pytest.raises(PassError, match=r"'lin9' matches no layer; the nearest names are 'lin0'"):
            self.adapted(("lin9",))
        with pytest.raises(PassError, match="has no layer that an adapter could go on"):
            module = capture(nn.ReLU(), (torch.randn(2),)).module
            inject(module, LoRA())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"rank": 0}, "'rank' is 1 to 65536, not 0"),
            ({"rank": 10**12}, "'rank' is 1 to 65536, not 1000000000000"),
            ({"rank_pattern": {"*": 10**12}}, r"'rank_pattern.\*' is 1 to 65536, not 1000000000000"),
            ({"dropout": 1.0}, "'dropout' is 0 or more and below 1"),
            ({"targets": ("re:(",)}, "the regular expression '\\(', which is wrong"),
            ({"targets": ("op:liner",)}, "did you mean 'op:linear'"),
            ({"targets": ("shape:a",)}, "the shape 'a'"),
            ({"targets": ()}, "'targets' is empty"),
            ({"slices": ("w",)}, "expected q, k, v, or a range"),
            ({"init": "magic"}, "'init' is one of default, gaussian"),
            ({"adapter": "a.b"}, "'adapter' is a name"),
            *(({"adapter": name}, f"'adapter' can't be '{name}'") for name in ("name", "batch", "forward", "base")),
            ({"slices": ("q",), "dora": True}, "'slices' goes with neither"),
        ],
    )
    def test_bad_options(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(SpecError, match=message):
            LoRA(**options)

    def test_unknown_modules_to_save(self) -> None:
        with pytest.raises(PassError, match="no module is called 'lin7' of 'modules_to_save'; the nearest are 'lin0'"):
            self.adapted(("*",), modules_to_save=("lin7",))

    def test_round_trips_as_text(self) -> None:
        text = "lora{rank=4,alpha=16.0,targets=[*.attn.*,head],rank_pattern={head=2},dora=true,slices=[q,v]}"
        (lora,) = spec.parse(text.replace("dora=true,", ""))
        assert isinstance(lora, LoRA)
        assert lora == dataclasses.replace(
            LoRA(), rank=4, alpha=16, targets=("*.attn.*", "head"), rank_pattern={"head": 2}, slices=("q", "v")
        )
        assert spec.parse(spec.render([lora])) == (lora,)


class TestSlices:
    def test_q_and_v_alone(self) -> None:
        model, x = FusedQKV().eval(), torch.randn(2, 5, 8)
        module = capture(model, (x,)).module
        inject(module, LoRA(rank=2, targets=("qkv",), slices=("q", "v")))
        adapter = module.get_submodule("lora.qkv")
        assert isinstance(adapter, LayerAdapter)
        optimizer = torch.optim.AdamW(trainable_parameters(module), 0.1)
        for _ in range(3):
            module(x).square().sum().backward()
            optimizer.step()
        with torch.no_grad():
            delta = adapter.folded(module.get_parameter("qkv.weight")) - model.qkv.weight
            assert delta[8:16].abs().max() == 0
            assert delta[:8].abs().max() > 0
            assert delta[16:].abs().max() > 0
            adapted = module(x)
            merge(module, (x,))
            assert (module(x) - adapted).abs().max() < 1e-5

    @pytest.mark.parametrize(
        ("model", "example", "cut", "reason"),
        [
            (nn.Linear(4, 24), floats(2, 4), "8-99", "it has 24 outputs, none from 8 to 99"),
            (nn.Linear(4, 8), floats(2, 4), "q", "slice 'q' is a third, and it has 8 outputs; give a range like 0-4"),
            (nn.Conv1d(4, 8, 3, groups=2), floats(2, 4, 9), "2-4", "slices are rows of a weight, and its outputs are"),
            (nn.ConvTranspose1d(4, 6, 3), floats(2, 4, 9), "0-2", "slices are rows of a weight, and its outputs are"),
            (nn.Embedding(9, 6), ints(2, 4, high=9), "0-2", "slices are rows of a weight, and its outputs are not"),
        ],
        ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
    )
    def test_what_has_no_such_outputs_is_a_skip(
        self, model: nn.Module, example: Callable[[], Tensor], cut: str, reason: str
    ) -> None:
        module = capture(nn.Sequential(model), (example(),)).module
        region = fxopt.graph.Program(module).regions[0]
        (skip,) = LoRA(targets=("*",), slices=("0-1", cut)).run(region)
        assert isinstance(skip, Skip)
        assert skip.reason.startswith(reason)


def test_runs_verified_by_the_pipeline() -> None:
    model, x = MLP().eval(), torch.randn(4, 10)
    result = fxopt.optimize(model, x, "lora{rank=2,targets=lin0}", devices=())
    entry = next(iter(result.ledger))
    assert entry.relative_error is not None
    assert entry.relative_error < 1e-6
    assert [change.where for change in entry.changes] == ["lin0", "adapter 'default'"]


def test_what_it_makes_copies_and_pickles() -> None:
    for name in CASES:
        _, module, x, _ = with_adapters(name)
        randomize(module)
        with torch.no_grad():
            expected = module(x)
            for duplicate in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
                assert torch.equal(duplicate(x), expected)
                merge(duplicate)
            assert torch.equal(module(x), expected)


def wide_enough(dora: bool) -> torch.dtype:
    """DoRA divides by the norms of W + BA, which may nearly cancel: float32 keeps too few digits of that."""
    return torch.float64 if dora else torch.float32


@settings(max_examples=60, deadline=None)
@given(
    rank=st.integers(1, 9),
    groups=st.integers(1, 3),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    kernel=st.integers(1, 3),
    dilation=st.integers(1, 2),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    transposed=st.booleans(),
    dora=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_convolution(
    rank: int,
    groups: int,
    inputs: int,
    outputs: int,
    kernel: int,
    dilation: int,
    stride: int,
    padding: int,
    transposed: bool,
    dora: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    kind = nn.ConvTranspose1d if transposed else nn.Conv1d
    options = {"groups": groups, "dilation": dilation, "stride": stride, "padding": padding}
    dtype = wide_enough(dora)
    layer = kind(inputs * groups, outputs * groups, kernel, **options, dtype=dtype)  # type: ignore[arg-type]
    model = nn.Sequential(layer).eval()
    x = torch.randn(2, inputs * groups, 9, dtype=dtype)
    module = capture(model, (x,)).module
    inject(module, LoRA(rank=rank, targets=("*",), dora=dora))
    with torch.no_grad():
        assert (module(x) - model(x)).abs().max() <= (1e-6 if dora else 0)
        randomize(module)
        adapted = module(x)
        assert (adapted - model(x)).abs().max() > 0
        merge(module)
        assert (module(x) - adapted).abs().max() <= 2e-5 * max(1, adapted.abs().max())


@settings(max_examples=40, deadline=None)
@given(
    rank=st.integers(1, 12),
    inputs=st.integers(1, 9),
    outputs=st.integers(1, 9),
    dims=st.integers(1, 4),
    dora=st.booleans(),
)
def test_any_linear(rank: int, inputs: int, outputs: int, dims: int, dora: bool) -> None:
    torch.manual_seed(rank)
    dtype = wide_enough(dora)
    model = nn.Sequential(nn.Linear(inputs, outputs, dtype=dtype)).eval()
    x = torch.randn(*[2] * (dims - 1), inputs, dtype=dtype)
    module = capture(model, (x,)).module
    inject(module, LoRA(rank=rank, dora=dora))
    with torch.no_grad():
        assert (module(x) - model(x)).abs().max() <= (1e-6 if dora else 0)
        randomize(module)
        adapted = module(x)
        merge(module)
        assert (module(x) - adapted).abs().max() <= 2e-5 * max(1, adapted.abs().max())


def test_convolutions_from_the_zoo_of_peft_merge() -> None:
    x = torch.randn(2, 16, 4, 4)
    module = capture(ConvNet(2, 16, 32, 3, groups=2, padding=1, hidden=512).eval(), (x,)).module
    inject(module, LoRA(targets=("*",)))
    randomize(module)
    with torch.no_grad():
        adapted = module(x)
        merge(module, (x,))
        assert relative_error(adapted, module(x)) <= 1e-4
