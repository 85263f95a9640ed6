"""Merging: in float64, only where the adapter is, verified, exact to take back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import fxopt
from fxopt import capture
from fxopt.capture import Captured
from fxopt.errors import ArtifactError, PassError
from fxopt.pipeline import run_passes
from passes import QAT, Clean, Fuse, LoRA, LoRAMerge
from passes.lora import load_adapter, merge, save_adapter, set_adapter, trainable_parameters, unmerge
from passes.lora.fold import merged_weights
from passes.lora.inject import inject
from tests.passes.lora.conftest import randomize
from tests.passes.lora.small import MLP, AlsoAWhole, Opaque, Tied, TiedByFunction, TwoNames
from tests.passes.lora.test_inject import CASES


def adapted(model: nn.Module, x: torch.Tensor, **options: object) -> Captured:
    captured = capture(model.eval(), (x,))
    inject(captured.module, LoRA(rank=3, **options))  # type: ignore[arg-type]
    randomize(captured.module)
    return captured


@pytest.mark.parametrize("name", CASES)
def test_the_pass_leaves_the_model_as_it_was_built(name: str) -> None:
    build, example, _ = CASES[name]
    model, x = build(), example()
    captured = adapted(model, x, targets=("*",))
    with torch.no_grad():
        expected = captured.module(x)
        ledger = run_passes(captured, [LoRAMerge()])
        assert (captured.module(x) - expected).abs().max() <= 5e-6 * expected.abs().max()
    assert not ledger.skips
    assert captured.module.state_dict().keys() == model.state_dict().keys()
    assert {type(child).__name__ for child in captured.module.modules()} & {"LayerAdapter", "WeightAdapter"} == set()


def test_a_tied_weight_that_is_adapted_at_one_place_only() -> None:
    """PEFT changes the embedding with the head (peft#2018): outputs were 0.61 off."""
    x = torch.randint(0, 20, (3, 7))
    model = Tied()
    module = adapted(model, x, targets=("head",)).module
    with torch.no_grad():
        expected, embedding = module(x), module.get_parameter("embed.weight")
        merge(module, (x,))
        assert torch.allclose(module(x), expected, atol=1e-5)
        assert module.get_parameter("embed.weight") is embedding
        assert not torch.equal(module.get_parameter("head.weight"), embedding)
        with pytest.raises(ArtifactError, match=r"'embed\.weight' and 'head\.weight' are one weight of the model"):
            merged_weights(module, model)
        unmerge(module)
        assert module.get_parameter("head.weight") is embedding


@pytest.mark.parametrize("init", ["default", "pissa"])
@pytest.mark.parametrize("targets", [("all-linear",), ("op:embedding", "op:weight")])
@pytest.mark.parametrize("build", [TiedByFunction, AlsoAWhole])
def test_a_weight_that_is_meant_at_one_use_is_adapted_at_all(
    build: type[nn.Module], targets: tuple[str, ...], init: str, tmp_path: Path
) -> None:
    model, x = build().eval(), torch.randint(0, 20, (3, 7)) if build is TiedByFunction else torch.randn(3, 8)
    module = adapted(model, x, targets=targets, init=init).module
    with torch.no_grad():
        assert not torch.allclose(module(x), model(x), atol=1e-2)
    inject(module, LoRA(rank=2, targets=targets, adapter="second"))
    randomize(module)
    save_adapter(module, tmp_path)
    fresh = capture(model, (x,)).module
    load_adapter(fresh, tmp_path)
    with torch.no_grad():
        assert torch.allclose(fresh(x), module(x), atol=1e-4)
        set_adapter(module, "second")
        expected = module(x)
        merge(module)
        assert torch.allclose(module(x), expected, atol=1e-4)


def test_a_weight_that_is_also_read_without_its_adapter() -> None:
    class Limited(TiedByFunction):
        def __init__(self) -> None:
            super().__init__()
            self.embed.max_norm = 100.0

    module = adapted(Limited(), torch.randint(0, 20, (3, 7))).module
    reason = "its weight is read without the adapter by 'embed'"
    with pytest.raises(PassError, match=f"'embed' can't be merged: {reason}"):
        merge(module)


def test_one_module_under_two_names() -> None:
    """PEFT folds the adapter in once a name: outputs were 5.9 off."""
    x = torch.randn(3, 8)
    module = adapted(TwoNames(), x).module
    with torch.no_grad():
        expected = module(x)
        merge(module, (x,))
        assert torch.allclose(module(x), expected, atol=1e-5)


def test_unmerging_is_exact() -> None:
    """PEFT subtracts what it added: a quarter of the float32 weights were another one afterwards."""
    module = adapted(MLP(), torch.randn(3, 10)).module
    before = module.get_parameter("lin0.weight").detach().clone()
    for _ in range(5):
        merge(module)
        unmerge(module)
    assert torch.equal(module.get_parameter("lin0.weight"), before)


def test_weights_of_a_merged_module_load_into_the_original() -> None:
    x, model = torch.randint(0, 20, (3, 7)), Tied()
    module = adapted(model, x, targets=("*",)).module
    with torch.no_grad():
        expected = module(x)
        merge(module)
        model.load_state_dict(merged_weights(module, model))
        assert torch.allclose(model(x), expected, atol=1e-5)


def test_a_module_may_be_converted_between_merging_and_unmerging() -> None:
    x = torch.randint(0, 20, (3, 7))
    module = adapted(Tied(), x, targets=("*",)).module
    before = module.get_parameter("embed.weight").detach().clone()
    merge(module)
    module.double()
    unmerge(module)
    assert torch.equal(module.get_parameter("embed.weight"), before.double())
    assert module.get_parameter("head.weight") is module.get_parameter("embed.weight")
    assert module(x).dtype is torch.float64


def test_merging_is_better_than_in_float32() -> None:
    module = adapted(MLP(), torch.randn(3, 10)).module
    weight, low = module.get_parameter("lin0.weight").double(), module.get_submodule("lora.lin0.default")
    exact = weight + low.scale * low.B.double() @ low.A.double()  # type: ignore[union-attr, operator]
    merge(module)
    assert torch.equal(module.get_parameter("lin0.weight"), exact.float())


def test_a_module_that_trains_is_compared_without_its_dropout_and_left_as_it_is() -> None:
    class Twice(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.mul_(2))

    x = torch.randn(8, 10)
    model = Twice(nn.Linear(10, 10), nn.BatchNorm1d(10), nn.Dropout(0.5), nn.Linear(10, 2))
    module = adapted(model, x.clone(), dropout=0.5).module.train()
    module.get_submodule("1").eval()
    state = {name: buffer.clone() for name, buffer in module.named_buffers()}
    modes, random, given = [child.training for child in module.modules()], torch.get_rng_state(), x.clone()
    merge(module, x)
    assert [child.training for child in module.modules()] == modes
    assert all(torch.equal(buffer, state[name]) for name, buffer in module.named_buffers())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, given)


def test_zeros_are_kept() -> None:
    model = MLP()
    with torch.no_grad():
        model.lin0.weight.mul_(torch.rand_like(model.lin0.weight) > 0.5)
    x = torch.randn(3, 10)
    captured = adapted(model, x)
    zeros = model.lin0.weight == 0
    run_passes(captured, [LoRAMerge(keep_zeros=True)])
    weight = captured.module.get_parameter("lin0.weight")
    assert torch.equal(weight == 0, zeros)
    assert not torch.equal(weight, model.lin0.weight)


def test_what_no_weight_can_hold() -> None:
    x = torch.randn(3, 10)
    captured = capture(MLP().eval(), (x,))
    run_passes(captured, [QAT(), LoRA()])
    randomize(captured.module)
    with pytest.raises(PassError, match="'lin0' can't be merged: its weight is fake-quantised"):
        merge(captured.module)
    ledger = run_passes(captured, [LoRAMerge()])
    assert not ledger.changes
    assert ledger.skips[0].reason.startswith("its weight is fake-quantised")


class TestComposes:
    """Whatever order: the adapter has an effect, and merging gives the same outputs."""

    def conv(self) -> nn.Module:
        layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
        )
        for _ in range(3):
            layers(torch.randn(8, 3, 8, 8))
        return layers.eval()

    @pytest.mark.parametrize(
        "passes",
        [
            [Clean(), Fuse(), LoRA(targets=("*",))],
            [LoRA(targets=("*",)), Fuse()],
            [Fuse(), QAT(), LoRA(targets=("*",))],
            [LoRA(targets=("*",)), QAT()],
        ],
        ids=["after fuse", "before fuse", "after qat", "before qat"],
    )
    def test_with_fuse_and_qat(self, passes: list[fxopt.contract.Pass]) -> None:
        model, x = self.conv(), torch.randn(2, 3, 8, 8)
        result = fxopt.optimize(model, x, passes, devices=(), calibration_data=[x])
        module = result.module
        entry = next(entry for entry in result.ledger if entry.pass_name == "lora")
        assert len(entry.changes) == 3
        with torch.no_grad():
            before = module(x)
            randomize(module)
            after = module(x)
            assert (after - before).abs().max() > 1e-2
            if not any(isinstance(each, QAT) for each in passes):
                merge(module, (x,))
                assert torch.allclose(module(x), after, atol=1e-4)
                unmerge(module)
        module.train()(x).sum().backward()

    @pytest.mark.parametrize("passes", ["lora{targets=op:attention},qat", "lora{targets=op:attention},ptq"])
    def test_attention_inside_of_a_layer_is_quantised_with_its_adapters(self, passes: str) -> None:
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model, x = nn.Sequential(layer, nn.Linear(8, 8)).eval(), torch.randn(2, 5, 8)
        module = fxopt.optimize(model, x, passes, devices=(), calibration_data=[x]).module
        with torch.no_grad():
            before = module(x)
            randomize(module)
            adapted = module(x)
            assert (adapted - before).abs().max() > 1e-2
            merge(module, x)
            assert torch.allclose(module(x), adapted, atol=1e-5)

    def test_with_a_function_that_is_fused(self) -> None:
        class Residual(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(4, 4))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return F.relu(F.linear(x, self.weight) + x)

        model, x = Residual().eval(), torch.randn(3, 4)
        module = fxopt.optimize(model, x, [Fuse(), LoRA(targets=("*",))], devices=()).module
        assert torch.equal(module(x), model(x))
        randomize(module)
        adapted = module(x)
        assert not torch.allclose(adapted, model(x))
        merge(module, (x,))
        assert torch.allclose(module(x), adapted, atol=1e-5)
        assert torch.allclose(F.relu(F.linear(x, module.weight) + x), adapted, atol=1e-5)

    def test_fuse_after_merging(self) -> None:
        model, x = self.conv(), torch.randn(2, 3, 8, 8)
        captured = adapted(model, x, targets=("*",))
        with torch.no_grad():
            expected = captured.module(x)
            ledger = run_passes(captured, [LoRAMerge(), Fuse()])
            assert torch.allclose(captured.module(x), expected, atol=1e-4)
        assert not any("BatchNorm" in type(child).__name__ for child in captured.module.modules())
        assert len(ledger.changes) >= 4

    def test_bfloat16(self) -> None:
        x = torch.randn(3, 10).bfloat16()
        module = adapted(MLP().bfloat16(), x).module
        assert module.get_parameter("lora.lin0.default.A").dtype is torch.float32
        with torch.no_grad():
            out = module(x)
            assert out.dtype is torch.bfloat16
            merge(module, (x,))
            assert torch.allclose(module(x), out, atol=0.1)
        unmerge(module)
        with torch.autocast("cpu", torch.bfloat16):
            module.float()(x.float()).sum().backward()
            with torch.no_grad():
                module(x.float())

    def test_compile(self) -> None:
        x = torch.randn(3, 10)
        module = adapted(MLP(), x).module
        compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
        with torch.no_grad():
            assert torch.allclose(compiled(x), module(x), atol=1e-6)
        compiled(x).sum().backward()
        assert module.get_parameter("lora.lin0.default.B").grad is not None

    @pytest.mark.filterwarnings("ignore")
    def test_inductor(self) -> None:
        x = torch.randn(3, 10)
        module = adapted(MLP(), x).module
        compiled = torch.compile(module, fullgraph=True)
        with torch.no_grad():
            assert torch.allclose(compiled(x), module(x), atol=1e-6)
            merge(module, (x,))
            assert torch.allclose(torch.compile(module, fullgraph=True)(x), module(x), atol=1e-6)

    def test_it_is_a_graph_and_can_be_captured_again(self) -> None:
        x = torch.randn(3, 10)
        module = adapted(MLP(), x).module
        assert isinstance(module, torch.fx.GraphModule)
        with torch.no_grad():
            again = fxopt.capture(module, (x,))
            assert again.opaque == ()
            assert torch.equal(again.module(x), module(x))

    @pytest.mark.parametrize("engine", ["onednn", "onnxruntime", "openvino", "inductor"])
    @pytest.mark.filterwarnings("ignore")
    def test_engines(self, engine: str) -> None:
        x = torch.randn(3, 10)
        module = adapted(MLP(), x).module
        with torch.no_grad():
            expected = module(x)
            assert torch.allclose(fxopt.lower(module, x, engine)(x), expected, atol=1e-5)
            merge(module, (x,))
            assert torch.allclose(fxopt.lower(module, x, engine)(x), expected, atol=1e-5)

    def test_a_masked_weight_trains_and_keeps_its_zeros(self) -> None:
        x = torch.randn(3, 10)
        model = MLP().eval()
        mask = torch.rand_like(model.lin0.weight) > 0.5
        prune.custom_from_mask(model.lin0, "weight", mask)
        captured = fxopt.capture(model, (x,))
        run_passes(captured, [LoRA(rank=2, targets=("*lin*",))])
        randomize(captured.module)
        captured.module(x).sum().backward()
        assert all(parameter.grad is not None for parameter in trainable_parameters(captured.module))
        with torch.no_grad():
            expected = captured.module(x)
            assert (expected - model(x)).abs().max() > 1e-3
            run_passes(captured, [LoRAMerge()])
            assert torch.allclose(captured.module(x), expected, atol=1e-5)
            inner = captured.module.get_parameter("lin0.weight_orig") * mask
            hidden = torch.relu(F.linear(x, inner, model.lin0.bias))
            last = F.linear(hidden, captured.module.get_parameter("lin1.weight"), model.lin1.bias)
            assert torch.allclose(torch.log_softmax(last, -1), expected, atol=1e-5)

    def test_gradient_checkpointing(self) -> None:
        x = torch.randn(3, 10)
        module = adapted(MLP(), x).module
        module(x).sum().backward()
        expected = module.get_parameter("lora.lin0.default.A").grad
        assert expected is not None
        module.zero_grad()
        torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False).sum().backward()
        assert torch.equal(module.get_parameter("lora.lin0.default.A").grad, expected)

    def test_opaque_parts(self) -> None:
        x = torch.randn(3, 8)
        module = adapted(Opaque(), x, targets=("gate.left", "gate.right")).module
        with torch.no_grad():
            for value in (x, -x):
                out = module(value)
                merge(module)
                assert torch.allclose(module(value), out, atol=1e-5)
                unmerge(module)


def test_pissa_is_saved_as_an_adapter_of_the_original(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, x = MLP().eval(), torch.randn(3, 10)
    module = adapted(model, x, init="pissa", targets=("*",)).module
    save_adapter(module, tmp_path)
    fresh = capture(model, (x,)).module
    load_adapter(fresh, tmp_path)
    with torch.no_grad():
        assert torch.allclose(fresh(x), module(x), atol=1e-5)
