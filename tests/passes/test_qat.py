"""qat: where the quantisers go, what they compute, and that the model still trains."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxopt.contract import Change, Skip
from fxopt.errors import PassError, SpecError
from fxopt.graph import GraphModule, Program
from fxopt.inputs import Inputs
from fxopt.modules import FakeQuantize, Fused, State
from passes import QAT, Fuse
from passes.qat import calibrate
from tests.models import STATIC, ConvBlock, PairTwice, TiedHead
from tests.passes.programs import Outcome, assert_close, captured, leaves, rewrite, run

X = (2, 4, 7, 7)


def reference(x: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int, symmetric: bool) -> np.ndarray:
    """Fake quantisation in plain numpy, with ranges that broadcast."""
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    if symmetric:
        top = 2 ** (bits - 1) - 1
        scale = np.maximum(-low, high) / np.float32(top)
        return np.clip(np.rint(x / scale), -top - 1, top) * scale
    top = 2**bits - 1
    scale = (high - low) / np.float32(top)
    zero = np.clip(-np.rint(low / scale), 0, top)
    return (np.clip(np.rint(x / scale) + zero, 0, top) - zero) * scale


class TestFakeQuantize:
    @pytest.mark.parametrize("bits", [2, 3, 4, 8, 16])
    @pytest.mark.parametrize("symmetric", [False, True])
    @pytest.mark.parametrize("axis", [None, 0, 1])
    def test_against_numpy(self, bits: int, symmetric: bool, axis: int | None) -> None:
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)) * 3 + 0.5
        fake = FakeQuantize(bits, symmetric=symmetric, axis=axis, channels=1 if axis is None else x.shape[axis])
        actual = fake(x)
        others = None if axis is None else 1 - axis
        values = x.numpy()
        low, high = values.min(others, keepdims=True), values.max(others, keepdims=True)
        expected = reference(values, low, high, bits, symmetric)
        # A value on the border between two steps may fall to either side.
        step = fake.scale.max().item()
        off = np.abs(actual.numpy() - expected)
        assert (off < 1e-5).mean() > 0.95
        assert off.max() < step * 1.01
        assert len(np.unique(actual.numpy())) <= 2**bits or axis is not None

    def test_zero_is_exact_and_a_constant_zero_is_harmless(self) -> None:
        fake = FakeQuantize()
        assert fake(torch.zeros(4)).eq(0).all()
        assert fake.scale > 0
        x = torch.tensor([-1.3, 0.0, 2.9])
        assert fake(x)[1] == 0

    def test_the_gradient_passes_inside_the_range_only(self) -> None:
        fake = FakeQuantize().eval()
        fake.observe(torch.tensor([-1.0, 1.0]))
        fake.ready = True
        x = torch.tensor([-3.0, -0.5, 0.5, 3.0], requires_grad=True)
        fake(x).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [0, 1, 1, 0]

    def test_evaluation_never_moves_a_range(self) -> None:
        fake = FakeQuantize()
        fake(torch.randn(10))
        before = copy.deepcopy(fake.state_dict())
        fake.eval()(torch.randn(10) * 100)
        assert_close(fake.state_dict(), before, 0)

    def test_passes_on_what_it_does_not_know(self) -> None:
        x = torch.randn(10)
        assert FakeQuantize().eval()(x) is x

    def test_observing_passes_on(self) -> None:
        fake = FakeQuantize()
        fake.state = State.OBSERVE
        x = torch.randn(10)
        assert fake(x) is x
        assert fake.maximum == x.max()

    def test_observers(self) -> None:
        batches = [torch.tensor([-1.0, 1.0]), torch.tensor([0.0, 3.0])]
        expected = {"minmax": (-1.0, 3.0), "ema": (-0.9, 1.2), "current": (0.0, 3.0)}
        for observer, (low, high) in expected.items():
            fake = FakeQuantize(observer=observer)
            for batch in batches:
                fake(batch)
            assert (fake.minimum.item(), fake.maximum.item()) == pytest.approx((low, high))

    def test_moves_an_average_in_half_too(self) -> None:
        fake = FakeQuantize(observer="ema").bfloat16()
        for batch in ([-1.0, 1.0], [0.0, 3.0]):
            fake(torch.tensor(batch, dtype=torch.bfloat16))
        assert (fake.minimum.item(), fake.maximum.item()) == pytest.approx((-0.9, 1.2), rel=1e-2)

    @pytest.mark.parametrize("learned", [False, True])
    def test_takes_an_empty_input(self, learned: bool) -> None:
        fake = FakeQuantize(learned=learned)
        fake(torch.randn(4))
        assert fake(torch.randn(0, 4)).shape == (0, 4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_gives_back_the_dtype(self, dtype: torch.dtype) -> None:
        fake = FakeQuantize()
        assert fake(torch.randn(4).to(dtype)).dtype is dtype
        assert fake.scale.dtype is torch.float32

    def test_works_under_autocast_and_in_half(self) -> None:
        layer = nn.Sequential(FakeQuantize(), nn.Linear(4, 4))
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(layer(torch.randn(2, 4)))
        assert found.dtype is torch.bfloat16
        found.float().sum().backward()
        gradient = layer[1].weight.grad
        assert gradient is not None and gradient.isfinite().all() and gradient.any()
        assert layer.bfloat16()(torch.randn(2, 4).bfloat16()).dtype is torch.bfloat16

    def test_a_loaded_range_counts(self) -> None:
        fake = FakeQuantize()
        fake(torch.randn(10))
        other = FakeQuantize()
        other.load_state_dict(fake.state_dict())
        x = torch.randn(10)
        assert other.ready
        assert_close(other.eval()(x), fake.eval()(x), 0)

    def test_nan_is_no_range(self) -> None:
        fake = FakeQuantize()
        fake(torch.tensor([-1.0, 1.0]))
        fake(torch.tensor([torch.nan, 5.0]))
        assert fake.scale.isfinite()

    @pytest.mark.parametrize("bits", [1, 9, 32])
    def test_refuses_other_widths(self, bits: int) -> None:
        with pytest.raises(ValueError, match="expected 2 to 8, or 16"):
            FakeQuantize(bits)


def quantizers(module: nn.Module) -> dict[str, FakeQuantize]:
    return {name: child for name, child in module.named_modules() if isinstance(child, FakeQuantize)}


def finished(outcome: Outcome, *batches: object) -> list[Change | Skip]:
    return list(QAT().finish(outcome.module, [Inputs.of(batch) for batch in batches]))


class TestInsertion:
    def test_one_quantiser_for_one_value(self) -> None:
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x):
                return self.a(x) + self.b(x)

        outcome = run(QAT(), Twice(), (torch.randn(3, 4),))
        assert list(quantizers(outcome.module)) == [
            "a.weight_fake_quant",
            "b.weight_fake_quant",
            "input_fake_quant.a",
        ]

    def test_a_value_written_in_between_is_another(self) -> None:
        class Writes(nn.Module):
            def __init__(self):
                super().__init__()
                self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x):
                x = x + 0
                y = self.a(x)
                x.mul_(2)
                return y + self.b(x)

        model = Writes().eval()
        x = torch.randn(3, 4)
        outcome = run(QAT(), model, (x,))
        assert [name for name in quantizers(outcome.module) if "input" in name] == [
            "input_fake_quant.a",
            "input_fake_quant.b",
        ]
        finished(outcome, x)
        assert_close(outcome.module(x), model(x), 0.1)

    def test_a_reused_layer_has_one_weight_quantiser_and_an_input_one_a_call(self) -> None:
        outcome = run(Fuse(), PairTwice().eval(), (torch.randn(*X),))
        outcome = rewrite(QAT(), outcome.module)
        assert sorted(quantizers(outcome.module)) == [
            "conv.weight_fake_quant",
            "input_fake_quant.conv",
            "input_fake_quant.conv_1",
        ]

    def test_tied_weights_stay_tied(self) -> None:
        outcome = run(QAT(), TiedHead().eval(), (torch.randint(0, 20, (3, 7)),))
        assert outcome.module.get_parameter("head.weight") is outcome.module.get_parameter("embed.weight")

    def test_state_keys_stay(self) -> None:
        model = STATIC["staged_cnn"].build()
        outcome = run(QAT(), model, STATIC["staged_cnn"].example())
        keys = [key for key in outcome.module.state_dict() if "fake_quant" not in key]
        assert keys == list(model.state_dict())

    @pytest.mark.parametrize("groups", [1, 2])
    def test_channels_of_a_transposed_convolution(self, groups: int) -> None:
        model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=groups)).eval()
        outcome = run(QAT(), model, (torch.randn(*X),))
        fused = outcome.module.get_submodule("0")
        assert isinstance(fused, Fused)
        assert fused.weight_fake_quant is not None
        assert fused.weight_fake_quant.axis == 1
        assert fused.weight_fake_quant.scale.shape == (6 // groups,)

    def test_functions_of_parameters(self) -> None:
        class Functional(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(6, 4))

            def forward(self, x):
                return F.linear(F.linear(x, self.weight), self.weight.t()) + F.linear(x, self.weight).sum()

        model = Functional().eval()
        x = torch.randn(3, 4)
        outcome = run(QAT(), model, (x,))
        named = quantizers(outcome.module)
        assert sorted(named) == [
            "input_fake_quant.linear_1",
            "input_fake_quant.weight",
            "weight_fake_quant.weight",
            "weight_fake_quant.weight_1",
        ]
        assert {name: fake.axis for name, fake in named.items() if "weight_fake" in name} == {
            "weight_fake_quant.weight": 0,
            "weight_fake_quant.weight_1": 1,
        }
        finished(outcome, x)
        assert_close(outcome.module(x), model(x), 0.5)
        assert not rewrite(QAT(), outcome.module).changes

    def test_options(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        options = QAT(weights="int4", activations="int8", per_channel=False, observer="ema", exclude="1")
        outcome = run(options, model, (torch.randn(3, 4),))
        assert outcome.whats == ["0: weight fake-quantised to 4 bits and input fake-quantised to 8 bits"]
        weight, value = (quantizers(outcome.module)[name] for name in ("0.weight_fake_quant", "input_fake_quant.0"))
        assert (weight.bits, weight.axis, weight.symmetric) == (4, None, True)
        assert (value.bits, value.observer, value.symmetric) == (8, "ema", True)

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"bits": 1}, "'bits' is 2 to 8"), ({"weights": "int9"}, "'weights'"), ({"observer": "x"}, "'observer'")],
    )
    def test_bad_options(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(SpecError, match=message):
            QAT(**options)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("normalized_linear", "its weight or bias is computed"),
        ],
    )
    def test_refuses(self, name: str, reason: str) -> None:
        outcome = run(QAT(), STATIC[name].build(), STATIC[name].example())
        assert any(reason in text for text in outcome.reasons)

    def test_hooked_layers_stay(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4)).eval()
        model[0].register_forward_pre_hook(_ignore)
        outcome = run(QAT(), model, (torch.randn(3, 4),))
        assert not outcome.changes
        (reason,) = outcome.reasons
        assert "it has a forward-pre hook" in reason

    @pytest.mark.parametrize(
        ("target", "calls"),
        [
            ("generic", ["input_fake_quant.0", "0", "input_fake_quant.1", "1"]),
            ("onnxruntime", ["input_fake_quant.0", "0", "output_fake_quant.0", "1"]),
        ],
    )
    def test_both_modes_share_quantisers_which_are_in_the_mode_of_the_model(
        self, target: str, calls: list[str]
    ) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1))
        graphs = {mode: torch.fx.Tracer().trace(model) for mode in (False, True)}
        program = GraphModule(model, graphs)
        rewrite(QAT(target=target), program)  # type: ignore[arg-type]
        assert {name for name in quantizers(program) if "weight" not in name} == {calls[0], calls[2]}
        targets = [[str(n.target) for n in r.graph.nodes if n.op == "call_module"] for r in Program(program).regions]
        assert targets == [calls] * 2
        program(torch.randn(1, 3, 8, 8))
        assert all(fake.ready for fake in quantizers(program).values())


def _ignore(*_: object) -> None:
    return None


class TestCalibration:
    def program(self) -> GraphModule:
        return run(QAT(), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), (torch.randn(3, 4),)).module

    def test_takes_ranges_and_leaves_the_mode(self) -> None:
        program = self.program().train()
        data = [torch.randn(3, 4), (torch.randn(3, 4),), {"input": torch.randn(3, 4)}]
        assert calibrate(program, data) == ()
        assert all(q.ready and q.state is State.QUANTIZE and q.training for q in quantizers(program).values())
        seen = torch.cat([leaves(batch)[0] for batch in data])
        assert quantizers(program)["input_fake_quant.0"].maximum == seen.max()

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ([], "the data is empty"),
            ([torch.randn(3, 5)], r"does not take batch 1 \(3x5 float32\)"),
            ([torch.randn(3, 4), torch.full((3, 4), torch.nan)], "batch 2 holds NaN"),
            ([(torch.randn(3, 4), torch.zeros(3))], "without labels"),
        ],
    )
    def test_bad_data_leaves_the_ranges(self, data: object, message: str) -> None:
        program = self.program().eval()
        calibrate(program, [torch.randn(3, 4)])
        before = copy.deepcopy(program.state_dict())
        with pytest.raises(PassError, match=message):
            calibrate(program, data)  # type: ignore[arg-type]
        assert_close(program.state_dict(), before, 0)
        assert all(q.state is State.QUANTIZE and q.ready for q in quantizers(program).values())

    def test_masks_of_infinities_are_taken_and_what_they_reach_is_named(self) -> None:
        class Masked(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
                return self.layer(x).masked_fill(mask < 0, 0.0) + self.other(mask)

        x, mask = torch.randn(3, 4), torch.tensor([0.0, 0.0, 0.0, -torch.inf]).expand(3, 4)
        program = run(QAT(), Masked(), (x, mask)).module
        found = list(QAT().finish(program, [Inputs((x, mask))]))
        assert found[1:] == [
            Skip(
                "input_fake_quant.other",
                "NaN or Inf reached it in calibration, which no range holds: it does not quantise",
            )
        ]
        assert calibrate(program, [(x, mask), (x, torch.zeros(3, 4))]) == ()

    def test_needs_quantisers(self) -> None:
        with pytest.raises(PassError, match="put them in with the pass 'qat' first"):
            calibrate(nn.Linear(2, 2), [torch.randn(1, 2)])

    def test_finish(self) -> None:
        program = self.program()
        (skip,) = QAT().finish(program, [])
        assert isinstance(skip, Skip)
        assert "2 inputs are not quantised until" in skip.reason
        (change,) = QAT().finish(program, [Inputs.of(torch.randn(3, 4))])
        assert change == Change("calibrated on 1 batches (minmax)", "2 inputs")
        assert not list(QAT().finish(program, [Inputs.of(torch.randn(3, 4))]))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", STATIC)
def test_static_models(name: str, training: bool) -> None:
    case = STATIC[name]
    model, inputs = case.build().train(training), case.example()
    state = copy.deepcopy(model.state_dict())
    program = captured(model, inputs, case.kwargs)
    rewrite(Fuse(), program)
    outcome = rewrite(QAT(), program)
    finished(outcome, *(Inputs(case.example(seed), case.kwargs) for seed in (1, 2)))
    assert all(q.ready for q in quantizers(program).values())
    assert_close(model.state_dict(), state, 0)
    assert not rewrite(QAT(), program).changes
    program.eval()
    model.eval()
    with torch.no_grad():
        for mine, theirs in zip(
            leaves(program(*inputs, **case.kwargs)), leaves(model(*inputs, **case.kwargs)), strict=True
        ):
            noise = (mine - theirs).pow(2).mean()
            assert noise <= theirs.pow(2).mean() * 10**-2.5  # 25 dB
    restored = pickle.loads(pickle.dumps(program))
    assert_close(restored(*inputs, **case.kwargs), program(*inputs, **case.kwargs), 0)


@pytest.mark.parametrize("folded", [False, True])
def test_trains(folded: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(ConvBlock(3, 8), nn.MaxPool2d(2), ConvBlock(8, 8), nn.Flatten(), nn.Linear(8 * 16, 3))
    model.train(not folded)
    x = torch.randn(24, 3, 8, 8)
    y = torch.arange(24) % 3
    program = captured(model, (x,))
    rewrite(Fuse(), program)
    rewrite(QAT(bits=4), program)
    program.train()
    for child in program.modules():
        child._modules.pop("bn", None) if folded else None
    before = {name: parameter.detach().clone() for name, parameter in program.named_parameters()}
    optimizer = torch.optim.Adam(program.parameters(), 5e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = F.cross_entropy(program(x), y)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in program.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert not any(torch.equal(parameter, before[name]) for name, parameter in program.named_parameters())


def test_a_joined_norm_quantises_the_folded_weight() -> None:
    """In evaluation the training form gives what folding first and quantising then gives."""
    torch.manual_seed(0)
    case = STATIC["conv_zoo"]
    model, inputs = case.build(), case.example()
    joined = captured(copy.deepcopy(model).train(), inputs)
    rewrite(Fuse(), joined)
    joined.eval()
    folded = captured(model, inputs)
    rewrite(Fuse(), folded)
    for program in (joined, folded):
        rewrite(QAT(weights="int4", activations="uint16"), program)
        calibrate(program, [inputs])
    assert_close(joined(*inputs), folded(*inputs), 1e-2)
    assert any((a - b).abs().max() > 0.02 for a, b in zip(leaves(folded(*inputs)), leaves(model(*inputs)), strict=True))


def test_a_switched_off_channel_is_harmless() -> None:
    model = ConvBlock(3, 4).train()
    nn.init.zeros_(model.bn.weight)
    x = torch.randn(2, 3, 8, 8)
    program = captured(model, (x,))
    rewrite(Fuse(), program)
    rewrite(QAT(), program)
    out = program(x)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in program.parameters())
