"""Masks beside the other passes, an engine, and ONNX."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import PassError
from fxopt.graph import GraphModule
from fxopt.modules import FakeQuantize, Fused, FusedConv2d, for_inductor
from fxopt.rewriting import run_pass
from fxopt.spec import parse
from passes import lora, sparsify
from passes.sparsify import SparsityScheduler
from tests.models import settle
from tests.passes.sparsify.test_masks import MODELS, build, masked, run


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    return settle(nn.Sequential(*layers, nn.Linear(288, 16), nn.ReLU(), nn.Linear(16, 4)))


class ByHand(nn.Module):
    """A parameter that a function multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight)


def images() -> torch.Tensor:
    return torch.randn(4, 3, 6, 6)


def zeros_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {each.name: ~each.mask.mask for each in sparsify.masked_weights(module)}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    "spec",
    [
        "sparsify,fuse",
        "fuse,sparsify",
        "sparsify{granularity=2:4,exclude=['0']},fuse",
        "fuse,sparsify,qat",
        "sparsify,fuse,qat",
        "fuse,sparsify{scope=global}",
    ],
)
def test_masks_survive_what_comes_behind(spec: str, training: bool) -> None:
    x = images()
    module, _ = run(network().train(training), (x,), spec, [(x,)])
    zeros = zeros_of(module)
    assert len(zeros) >= 2
    for each in sparsify.masked_weights(module):
        assert not each.weight[zeros[each.name]].any()
        assert isinstance(each.owner, Fused)
    if not training:
        before = module(x)
        sparsify.bake(module)
        torch.testing.assert_close(module(x), before, rtol=0, atol=0)


def test_folding_keeps_the_mask_and_the_outputs() -> None:
    x = images()
    alone, _ = run(network().eval(), (x,), "sparsify{amount=0.7}")
    folded, _ = run(network().eval(), (x,), "sparsify{amount=0.7},fuse")
    torch.testing.assert_close(folded(x), alone(x))
    first = sparsify.masked_weights(folded)[0]
    assert isinstance(first.owner, FusedConv2d)
    assert torch.equal(first.mask.mask, sparsify.masked_weights(alone)[0].mask.mask)
    with torch.no_grad():
        first.weight.add_(~first.mask.mask)
    torch.testing.assert_close(folded(x), alone(x))


def test_quantised_zeros_stay_zero_through_training() -> None:
    x = images()
    module, _ = run(network().train(), (x,), "fuse,sparsify{amount=0.8},qat", [(x,)])
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    scheduler = SparsityScheduler(module, optimizer)
    for _ in range(5):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
        scheduler.step()
    module.eval()
    for each in sparsify.masked_weights(module):
        assert isinstance(each.owner, Fused)
        assert each.owner.weight_fake_quant is not None
        quantised = each.owner.weight_fake_quant(each.owner.scaled_weight())
        assert not quantised[~each.mask.mask].any()


def adapted(spec: str = "sparsify{amount=0.8},lora{rank=2,targets=['1']}") -> tuple[GraphModule, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 8)
    module, _ = run(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval(), (x,), spec)
    with torch.no_grad():
        for parameter in lora.trainable_parameters(module):
            parameter.normal_()
    return module, x


def test_an_adapter_merges_into_a_masked_weight_with_its_zeros_only() -> None:
    module, _ = adapted()
    zeros = zeros_of(module)["1"]
    before = module.get_parameter("1.weight").detach().clone()
    with pytest.raises(PassError, match="its weight has a mask, which would drop part of the update"):
        lora.merge(module)
    lora.merge(module, keep_zeros=True)
    merged = module.get_parameter("1.weight")
    assert torch.equal(merged == 0, zeros)
    assert not torch.equal(merged, before)


def test_a_baked_weight_merges_as_any_other() -> None:
    module, x = adapted("sparsify{amount=0.8},sparsify-bake,lora{rank=2,targets=['1']}")
    before = module(x)
    lora.merge(module)
    torch.testing.assert_close(module(x), before)


def quantised_weights(module: nn.Module, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What goes into each quantiser in one forward, and what comes out."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    fakes = [child for child in module.modules() if isinstance(child, FakeQuantize)]
    hooks = [fake.register_forward_hook(lambda _, args, out: seen.append((args[0], out))) for fake in fakes]
    module(x)
    for hook in hooks:
        hook.remove()
    return [(given.detach(), found.detach()) for given, found in seen]


@pytest.mark.parametrize("spec", ["sparsify{amount=0.75},qat", "fuse,sparsify{amount=0.75},ptq{weights=int4}"])
@pytest.mark.parametrize("name", MODELS)
def test_every_masked_weight_is_quantised_and_its_zeros_stay_zero_through_training(name: str, spec: str) -> None:
    model, x = build(name)
    module, ledger = run(model.train("qat" in spec), (x,), spec, [(x,)])
    assert not ledger.entries[-1].skips
    optimizer = torch.optim.AdamW(module.parameters(), 1e-2)
    scheduler = SparsityScheduler(module, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        module(x).square().sum().backward()
        optimizer.step()
        scheduler.step()
    seen = quantised_weights(module.eval(), x)
    for each in sparsify.masked_weights(module):
        zeros = ~each.mask.mask
        found = [out for given, out in seen if given.shape == zeros.shape and not given[zeros].any()]
        assert found, each.name
        assert not any(out[zeros].any() for out in found)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_masked_and_quantised_is_frozen_and_baked_as_it_is(name: str) -> None:
    model, x = build(name)
    module, _ = run(model, (x,), "sparsify{amount=0.75},qat", [(x,)])
    found = sparsify.masked_weights(module)
    zeros = [~each.mask.mask for each in found]
    before = module(x)
    for spec in ("quantize-freeze", "sparsify-bake"):
        for each in parse(spec):
            run_pass(each, module, ())
        torch.testing.assert_close(module(x), before)
    assert not sparsify.masked_weights(module)
    for each, where in zip(found, zeros, strict=True):
        parameter = each.name if each.leaf != "weight" else f"{each.name}.weight"
        assert not module.get_parameter(parameter)[where].any()


@pytest.mark.parametrize("name", ["linear", "embedding", "by hand"])
def test_integers_are_those_of_masked_weights_whatever_the_weights_are(name: str) -> None:
    model, x = build("linear")
    if name == "embedding":
        model, x = nn.Sequential(nn.Embedding(10, 8)), torch.tensor([[1, 2], [3, 4]])
    if name == "by hand":
        model, x = ByHand(), torch.randn(3, 8)
    module, _ = run(model, (x,), "sparsify{amount=0.5},qat{activations=none}")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3)
        stored = for_inductor(module)
        torch.testing.assert_close(stored(x), module.eval()(x))
    assert any(buffer.dtype is torch.int8 and buffer.dim() == 2 for buffer in stored.buffers())


@pytest.mark.parametrize("name", MODELS)
def test_weights_that_are_quantised_get_no_mask_behind_the_quantiser(name: str) -> None:
    model, x = build(name)
    module, ledger = run(model, (x,), "qat,sparsify", [(x,)])
    reasons = {skip.reason for skip in ledger.entries[1].skips}
    assert reasons <= {"it is fake-quantised; put sparsify before qat"}
    assert reasons or all(isinstance(each.owner, Fused) for each in sparsify.masked_weights(module))


@pytest.mark.parametrize("name", ["linear", "conv"])
def test_masks_stay_while_layers_are_cast(name: str) -> None:
    model, x = build(name)
    module, ledger = run(model, (x,), "sparsify{amount=0.75},cast{dtype=bf16}")
    assert not [skip for skip in ledger.entries[1].skips if skip.where != "(the machine)"]
    for each in sparsify.masked_weights(module):
        assert each.weight.dtype is torch.bfloat16
        assert torch.equal(each.weight != 0, each.mask.mask)
    plain = masked(model, (x,), "sparsify{amount=0.75}")
    torch.testing.assert_close(module(x), plain(x), rtol=0.1, atol=0.1)
    before = module(x)
    sparsify.bake(module)
    torch.testing.assert_close(module(x), before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_an_adapter_is_not_put_over_the_masks_of_recurrent_layers(name: str) -> None:
    model, x = build(name)
    with pytest.raises(PassError, match=r"adapters have no form for 'Masked(LSTM|GRU)'"):
        run(model, (x,), "sparsify,lora{rank=2,targets=[recurrent]}")
    module, _ = run(model, (x,), "sparsify,sparsify-bake,lora{rank=2,targets=[recurrent]}")
    before = module(x)
    lora.merge(module)
    torch.testing.assert_close(module(x), before)


@pytest.mark.parametrize("engine", ["eager", "onednn", "sparse", "onnxruntime"])
@pytest.mark.parametrize("name", ["lstm", "functional"])
def test_engines_run_masks(name: str, engine: str) -> None:
    model, x = build(name)
    module = masked(model, (x,), "sparsify{amount=0.75}")
    with torch.no_grad():
        torch.testing.assert_close(fxopt.lower(module, (x,), engine)(x), module(x))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("baked", [False, True])
def test_exports_to_onnx(baked: bool, tmp_path: Path) -> None:
    x = images()
    module, _ = run(network().eval(), (x,), "fuse,sparsify" + (",sparsify-bake" if baked else ""))
    path = tmp_path / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(module, (x,), path, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), module(x), rtol=1e-4, atol=1e-5)


def test_runs_by_an_engine() -> None:
    x = images()
    module, _ = run(network().eval(), (x,), "fuse,sparsify")
    torch.testing.assert_close(fxopt.lower(module, x, "onednn")(x), module(x), rtol=1e-4, atol=1e-5)


def test_lora_says_that_it_has_no_form_for_a_masked_recurrent_layer() -> None:
    _, ledger = run(
        nn.Sequential(nn.Linear(8, 8), nn.LSTM(8, 8)).eval(),
        (torch.randn(2, 5, 8),),
        "sparsify{amount=0.5},lora{rank=2,targets=['*']}",
    )
    assert [(skip.where, skip.reason) for skip in ledger.entries[1].skips] == [
        ("1", "adapters have no form for 'MaskedLSTM'")
    ]
