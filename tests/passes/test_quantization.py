"""Ranges from histograms, learned scales, schedules, placement by target, ptq, and freezing."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fxopt
from fxopt.errors import PassError, SpecError
from fxopt.graph import GraphModule
from fxopt.modules import FakeQuantize, Fused, State, histogram
from passes import PTQ, QAT, Fuse, QuantizeFreeze
from passes.qat import QATSchedule, calibrate, sensitivity
from passes.qat.correct import correct_biases
from tests.models import ConvBlock, TiedHead
from tests.passes.programs import Outcome, assert_close, captured, rewrite, run


def quantizers(module: nn.Module) -> dict[str, FakeQuantize]:
    return {name: child for name, child in module.named_modules() if isinstance(child, FakeQuantize)}


def sqnr(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Signal to quantisation noise, in dB."""
    return float(10 * torch.log10(wanted.square().mean() / (found - wanted).square().mean().clamp(min=1e-20)))


def heavy_tailed() -> torch.Tensor:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    return torch.cat([values, torch.tensor([60.0])])


class TestRanges:
    def observed(self, observer: str, bits: int = 4, *batches: torch.Tensor) -> FakeQuantize:
        fake = FakeQuantize(bits, observer=observer)  # type: ignore[arg-type]
        fake.state = State.OBSERVE
        for batch in batches or (heavy_tailed(),):
            fake(batch)
        fake.settle()
        return fake.eval()

    def test_an_outlier_does_not_cost_the_rest_its_resolution(self) -> None:
        values = heavy_tailed()[:-1]
        error = {
            observer: (self.observed(observer)(values) - values).square().mean().item()
            for observer in ("minmax", "percentile", "mse", "histogram")
        }
        assert max(error["percentile"], error["mse"], error["histogram"]) < error["minmax"] / 3

    @pytest.mark.parametrize("observer", ["percentile", "mse", "histogram"])
    @pytest.mark.parametrize("share", [0.5, 0.9])
    def test_zeros_of_a_relu_do_not_cost_the_rest_its_range(self, observer: str, share: float) -> None:
        values = torch.randn(10_000, generator=torch.Generator().manual_seed(0)).abs()
        values[: int(share * len(values))] = 0
        assert sqnr(self.observed(observer, 8, *values.split(3_000))(values), values) > 35

    @pytest.mark.parametrize("bits", [4, 8])
    @pytest.mark.parametrize(
        "function",
        [lambda x: (4 * x).softmax(-1), lambda x: (1.5 * x).exp(), lambda x: torch.where(x > 3, 20 * x, x), F.gelu],
        ids=["softmax", "exp", "outliers", "gelu"],
    )
    def test_few_values_that_matter_are_not_clipped(
        self, function: Callable[[torch.Tensor], torch.Tensor], bits: int
    ) -> None:
        values = function(torch.randn(500, 256, generator=torch.Generator().manual_seed(0)))
        least = sqnr(self.observed("minmax", bits, values)(values), values)
        for observer in ("histogram", "mse"):
            assert sqnr(self.observed(observer, bits, *values.split(200))(values), values) > least - 0.5

    def test_the_least_squared_error_is_about_the_best_of_all_ranges(self) -> None:
        values = heavy_tailed()
        found = self.observed("mse")
        rivals = []
        for high in torch.linspace(0.5, 60, 120):
            rival = FakeQuantize(4).eval()
            rival.observe(torch.stack([-high.clamp(max=4), high]))
            rivals.append((rival(values) - values).square().mean().item())
        assert (found(values) - values).square().mean().item() <= 1.1 * min(rivals)

    @pytest.mark.parametrize("bits", range(2, 9))
    @pytest.mark.parametrize("levels", [16, 17, 100, 256, 1024])
    def test_no_value_of_a_grid_lies_halfway_between_two_steps(self, levels: int, bits: int) -> None:
        grid = torch.arange(levels + 1) / levels
        fake = FakeQuantize(bits).eval()
        fake.observe(grid)
        places = grid.double() / fake.scale.double()
        halfway = places.floor() + 0.5
        assert ((places - halfway).abs() / halfway).min() > 5e-7, "several times what float32 rounds"

    def test_batches_count_as_one_histogram(self) -> None:
        values = heavy_tailed()[:-1]
        whole, parts = self.observed("mse", 4, values), self.observed("mse", 4, *values.split(20_000))
        assert parts.counts.sum() == len(values)
        assert_close(parts.scale, whole.scale, 0.05)

    def test_training_does_not_move_what_a_histogram_chose(self) -> None:
        fake = self.observed("percentile").train()
        scale = fake.scale.clone()
        fake(torch.randn(100) * 100)
        assert_close(fake.scale, scale, 0)

    def test_one_range_only(self) -> None:
        with pytest.raises(ValueError, match="takes one range of a whole tensor"):
            FakeQuantize(observer="mse", axis=0, channels=3)

    @given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=60), st.integers(0, 1000))
    @settings(max_examples=60, deadline=None)
    def test_widening_loses_no_count(self, values: list[float], more: int) -> None:
        given = torch.tensor(values)
        low, high = torch.aminmax(given)
        counts = histogram.counted(given, low, high)
        wider = histogram.widened(counts, low, high, low - more, high + more)
        assert counts.sum() == wider.sum() == len(values)


class TestLearnedScale:
    def test_its_gradient_is_that_of_lsq(self) -> None:
        """Esser et al. 2020, equation 3, with the damping of section 2.2."""
        fake = FakeQuantize(4, symmetric=True, learned=True).eval()
        fake.observe(torch.tensor([-1.0, 1.0]))
        x = torch.tensor([-3.0, -0.6, 0.02, 0.31, 5.0])
        fake(x).sum().backward()
        ratio = x / fake.scale.detach()
        inside = (ratio >= -8) & (ratio <= 7)
        expected = torch.where(inside, ratio.round() - ratio, ratio.clamp(-8, 7)).sum() / (len(x) * 7) ** 0.5
        assert_close(fake.scale.grad, expected)

    @given(st.sampled_from([2, 4, 8]), st.booleans(), st.floats(2**-13, 8, width=32), st.integers(0, 1 << 16))
    @settings(max_examples=60, deadline=None)
    def test_it_rounds_like_a_fixed_one_bit_by_bit(self, bits: int, symmetric: bool, width: float, seed: int) -> None:
        chance = torch.Generator().manual_seed(seed)
        fixed, learned = (
            FakeQuantize(bits, symmetric=symmetric, axis=0, channels=2, learned=each).eval() for each in (False, True)
        )
        for fake in (fixed, learned):
            fake.observe(width * torch.tensor([[-0.3, 1.0], [-1.0, 0.7]]))
        ties = fixed.scale.reshape(2, 1) * (torch.arange(-300, 300) / 2)
        x = torch.cat([ties, width * torch.randn(2, 600, generator=chance)], 1)
        assert torch.equal(learned(x), fixed(x))

    def test_training_it_reduces_the_error(self) -> None:
        x = heavy_tailed()[-2000:]
        fake = FakeQuantize(3, symmetric=True, learned=True)
        fake(x)
        optimizer = torch.optim.Adam(fake.parameters(), 0.3)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = (fake(x) - x)[:-1].square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] / 2

    def test_qat_makes_scales_parameters(self) -> None:
        outcome = run(QAT(learned="lsq"), nn.Sequential(nn.Linear(4, 4)).eval(), (torch.randn(3, 4),))
        names = dict(outcome.module.named_parameters())
        assert {"0.weight_fake_quant.scale", "input_fake_quant.0.scale"} <= names.keys()


class TestState:
    def test_it_is_in_the_state_dict(self) -> None:
        fake = FakeQuantize()
        fake(torch.randn(8))
        fake.state = State.FROZEN
        other = FakeQuantize()
        other.load_state_dict(fake.state_dict())
        assert other.state is State.FROZEN
        assert "frozen" in repr(other)

    def test_frozen_never_moves(self) -> None:
        fake = FakeQuantize()
        fake(torch.randn(8))
        fake.state = State.FROZEN
        scale = fake.scale.clone()
        fake.train()(torch.randn(8) * 100)
        assert_close(fake.scale, scale, 0)

    @pytest.mark.parametrize("learned", [False, "lsq"])
    def test_a_program_compiles_whole_and_trains(self, learned: str | bool) -> None:
        x = torch.randn(4, 3, 8, 8)
        program = captured(nn.Sequential(ConvBlock(3, 4), nn.Flatten(), nn.Linear(256, 3)).eval(), (x,))
        rewrite(Fuse(), program)
        rewrite(QAT(learned=learned, target="onnxruntime"), program)  # type: ignore[arg-type]
        calibrate(program, [x])
        program.train()
        compiled = torch.compile(copy.deepcopy(program), fullgraph=True, backend="aot_eager")
        assert_close(compiled(x), program(x), 1e-4)
        compiled(x).sum().backward()


class TestSchedule:
    def program(self, **options: object) -> GraphModule:
        x = torch.randn(4, 3, 8, 8)
        program = captured(ConvBlock(3, 4).train(), (x,))
        rewrite(Fuse(), program)
        rewrite(QAT(**options), program)  # type: ignore[arg-type]
        return program

    def test_it_drives_quantisers_and_norms(self) -> None:
        program, x = self.program(), torch.randn(4, 3, 8, 8)
        layer = next(child for child in program.modules() if isinstance(child, Fused))
        schedule = QATSchedule(program, quantize_from=1, freeze_norms_at=2, freeze_ranges_at=3)
        states, frozen = [], []
        for _ in range(4):
            program(x)
            states.append({fake.state for fake in quantizers(program).values()})
            frozen.append(layer.norm_frozen)
            schedule.step()
        assert states == [{State.OBSERVE}, {State.QUANTIZE}, {State.QUANTIZE}, {State.FROZEN}]
        assert frozen == [False, False, True, True]

    def test_evaluation_moves_no_range_before_rounding_begins(self) -> None:
        program = self.program()
        QATSchedule(program, quantize_from=10)
        program(torch.randn(4, 3, 8, 8))
        before = copy.deepcopy(program.state_dict())
        program.eval()(torch.randn(4, 3, 8, 8) * 100)
        assert_close(program.state_dict(), before, 0)

    @pytest.mark.parametrize("steps", [1, 3, 5])
    def test_it_goes_on_where_it_was_saved(self, steps: int) -> None:
        options = {"quantize_from": 2, "freeze_ranges_at": 5}
        program = self.program(learned="lsq", observer="mse")
        schedule = QATSchedule(program, **options)
        for _ in range(steps):
            program(torch.randn(4, 3, 8, 8))
            schedule.step()
        with torch.no_grad():
            for fake in quantizers(program).values():
                fake.scale.mul_(1.5)
        kept, weights = schedule.state_dict(), copy.deepcopy(program.state_dict())
        again = self.program(learned="lsq", observer="mse")
        again.load_state_dict(weights)
        resumed = QATSchedule(again, **options)
        resumed.load_state_dict(kept)
        assert resumed.steps == steps
        assert_close(again.state_dict(), weights, 0)
        resting = {fake.scale.requires_grad for fake in quantizers(again).values()}
        assert resting == {steps < 5}

    @pytest.mark.parametrize("learned", [False, "lsq"])
    @pytest.mark.parametrize("quantize_from", [0, 1])
    def test_an_average_of_weights_rounds_once_the_model_does(self, learned: object, quantize_from: int) -> None:
        program = self.program(learned=learned)
        schedule = QATSchedule(program, quantize_from=quantize_from)
        average = AveragedModel(program, avg_fn=lambda averaged, given, count: given)
        for _ in range(3):
            program(torch.randn(4, 3, 8, 8))
            schedule.step()
        average.update_parameters(program)
        x = torch.randn(4, 3, 8, 8)
        assert torch.equal(average.eval()(x), program.eval()(x))
        assert all(fake.rounds for fake in quantizers(average).values())

    def test_a_learned_scale_at_rest_is_not_moved_by_momentum(self) -> None:
        program = self.program(learned="lsq")
        schedule, optimizer = QATSchedule(program, freeze_ranges_at=2), torch.optim.Adam(program.parameters(), 0.1)
        for _ in range(4):
            optimizer.zero_grad(set_to_none=False)
            program(torch.randn(4, 3, 8, 8)).square().mean().backward()
            before = [fake.scale.detach().clone() for fake in quantizers(program).values()]
            optimizer.step()
            schedule.step()
        assert_close([fake.scale for fake in quantizers(program).values()], before, 0)

    def test_frozen_norms_use_and_keep_the_running_statistics(self) -> None:
        program = self.program()
        layer = next(child for child in program.modules() if isinstance(child, Fused))
        assert layer.bn is not None
        program(torch.randn(4, 3, 8, 8))
        QATSchedule(program, freeze_norms_at=0)
        before = copy.deepcopy(layer.bn.state_dict())
        x = torch.randn(2, 3, 8, 8) * 5
        for fake in quantizers(program).values():
            fake.state = State.FROZEN
        trained = program.train()(x)
        assert_close(layer.bn.state_dict(), before, 0)
        assert_close(program.eval()(x), trained)

    @pytest.mark.parametrize(
        ("options", "message"),
        [({"quantize_from": 5, "freeze_ranges_at": 2}, "ranges would rest at step 2")],
    )
    def test_refuses_nonsense(self, options: dict[str, int], message: str) -> None:
        with pytest.raises(PassError, match=message):
            QATSchedule(self.program(), **options)

    def test_needs_quantisers(self) -> None:
        with pytest.raises(PassError, match="no fake quantisers"):
            QATSchedule(nn.Linear(2, 2))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.relu(self.right(F.relu(self.left(x))) + x)
        return self.head(self.pool(x).flatten(1))


IMAGES = (2, 3, 8, 8)


class TestPlacement:
    def outcome(self, **options: object) -> Outcome:
        program = captured(Residual().eval(), (torch.randn(*IMAGES),))
        rewrite(Fuse(), program)
        return rewrite(QAT(**options), program)  # type: ignore[arg-type]

    def test_generic_quantises_what_goes_into_layers(self) -> None:
        assert {name for name in quantizers(self.outcome().module) if "weight" not in name} == {
            "input_fake_quant.stem",
            "input_fake_quant.left",
            "input_fake_quant.right",
            "input_fake_quant.head",
        }

    def test_onnxruntime_gets_outputs_and_the_sum_too(self) -> None:
        outcome = self.outcome(target="onnxruntime")
        assert {name for name in quantizers(outcome.module) if "weight" not in name} == {
            "input_fake_quant.stem",
            "output_fake_quant.stem",
            "output_fake_quant.left",
            "output_fake_quant.right",
            "right.inner_fake_quant",
            "output_fake_quant.pool",
        }
        calls = outcome.calls
        assert calls[calls.index("max_pool2d") + 1] == "output_fake_quant.stem"
        assert calls[-1] == "head"

    def test_what_onnxruntime_does_not_fold_stands_behind_a_quantiser(self) -> None:
        x = torch.randn(*IMAGES)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardswish(), nn.Conv2d(4, 4, 3), nn.ReLU6(), nn.Conv2d(4, 2, 1))
        program = captured(model.eval(), (x,))
        rewrite(Fuse(), program)
        rewrite(QAT(target="onnxruntime"), program)
        inner = [name for name in quantizers(program) if name.endswith("inner_fake_quant")]
        assert inner == ["0.inner_fake_quant"]

    @pytest.mark.parametrize("training", [False, True])
    def test_a_packed_sequence_stays_a_float(self, training: bool) -> None:
        class Packs(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.layer = nn.GRU(4, 4, batch_first=True)

            def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
                packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
                return nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)[0]

        inputs = (torch.randn(2, 3, 4), torch.tensor([3, 2]))
        result = fxopt.optimize(Packs().train(training), inputs, [QAT()], devices=(), calibration_data=[inputs])
        assert [name.rpartition(".")[2] for name in quantizers(result.module)] == [
            "weight_ih_l0_fake_quant",
            "weight_hh_l0_fake_quant",
        ]
        (skip,) = result.ledger.skips
        assert skip.where == "layer"
        assert "packed sequence" in skip.reason

    def test_a_pooling_that_gives_its_indices_too_is_not_looked_past(self) -> None:
        class Unpools(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.down, self.pool = nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2, return_indices=True)
                self.up, self.unpool = nn.Conv2d(4, 4, 3, padding=1), nn.MaxUnpool2d(2)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                x, indices = self.pool(self.down(x))
                return self.unpool(self.up(x), indices)

        x = torch.randn(*IMAGES)
        program = run(QAT(target="onnxruntime"), Unpools().eval(), (x,)).module
        assert calibrate(program, [x]) == ()

    def test_edges_can_stay_floats(self) -> None:
        outcome = self.outcome(first_last="keep")
        assert {name for name in quantizers(outcome.module) if "weight" in name} == {
            "left.weight_fake_quant",
            "right.weight_fake_quant",
        }
        assert sum("first_last=keep" in reason for reason in outcome.reasons) == 2

    def test_weights_alone(self) -> None:
        outcome = self.outcome(weights="int4", activations="none")
        assert all(fake.bits == 4 for fake in quantizers(outcome.module).values())
        assert all("weight" in name for name in quantizers(outcome.module))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"weights": "float8"}, "'weights' is int2 to int8"),
            ({"activations": "uint9"}, "'activations' is uint2"),
            ({"target": "tensorrt"}, "'target' is one of auto, generic"),
            ({"learned": "yes"}, "'learned' is one of False, lsq"),
            ({"first_last": "drop"}, "'first_last' is one of"),
        ],
    )
    def test_bad_options(self, options: dict[str, object], message: str) -> None:
        with pytest.raises(SpecError, match=message):
            QAT(**options)  # type: ignore[arg-type]


def unequal() -> nn.Module:
    """Channels whose weights differ by a factor of hundreds, undone by the next layer."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    factors = torch.logspace(-2, 1, 8)
    with torch.no_grad():
        for first, second in ((model[0], model[2]), (model[2], model[4])):
            first.weight.mul_(factors.reshape(-1, 1, 1, 1))
            first.bias.mul_(factors)
            second.weight.div_(factors.reshape(1, -1, 1, 1))
    return model.eval()


class Outliers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.gate = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)
        with torch.no_grad():
            self.norm.weight[3] = 80.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return self.down(F.silu(self.gate(y)) * self.up(y))


class TestBias:
    """onnxruntime's convolutions hold the bias as an integer, in steps of both scales' product."""

    def program(self, model: nn.Module, x: torch.Tensor, target: str = "onnxruntime") -> GraphModule:
        program = captured(nn.Sequential(model).eval(), (x,))
        rewrite(QAT(target=target), program)  # type: ignore[arg-type]
        calibrate(program, [x])
        return program

    def layer(self, program: nn.Module) -> Fused:
        return next(child for child in program.modules() if isinstance(child, Fused))

    def steps(self, layer: Fused) -> torch.Tensor:
        assert layer.weight_fake_quant is not None
        (fake,) = layer.reads
        bias = layer.folded_bias()
        assert bias is not None
        return bias.detach() / (fake.scale * layer.weight_fake_quant.scale)

    def test_it_lies_on_the_grid_in_the_simulation_already(self) -> None:
        torch.manual_seed(0)
        program = self.program(nn.Conv2d(3, 4, 3), torch.randn(*IMAGES))
        layer = self.layer(program)
        steps = self.steps(layer)
        assert_close(steps, steps.round(), 1e-6)
        assert not torch.equal(layer.folded_bias(), layer.bias)
        found = program(torch.randn(*IMAGES)).sum()
        found.backward()
        assert layer.bias.grad.abs().min() > 0, "the gradient passes straight through"

    def test_a_copy_reads_the_quantiser_of_its_own_program(self) -> None:
        program = self.program(nn.Conv2d(3, 4, 3), torch.randn(*IMAGES))
        for duplicate in (copy.deepcopy(program), pickle.loads(pickle.dumps(program))):
            layer = self.layer(duplicate)
            assert layer.reads[0] in duplicate.modules()
            assert layer.reads[0] not in program.modules()
        assert not any("reads" in name for name in program.state_dict())

    @pytest.mark.parametrize(
        ("model", "target", "reads"),
        [
            pytest.param(nn.Conv2d(3, 4, 3), "openvino", 0, id="a runtime that keeps it a float"),
            pytest.param(nn.Linear(8, 4), "onnxruntime", 0, id="a linear layer"),
            pytest.param(nn.ConvTranspose2d(3, 4, 3), "onnxruntime", 1, id="transposed"),
            pytest.param(nn.ConvTranspose2d(4, 4, 3, groups=2), "onnxruntime", 0, id="transposed, in groups"),
        ],
    )
    def test_it_is_rounded_where_the_kernel_rounds_it(self, model: nn.Module, target: str, reads: int) -> None:
        program = self.program(model, torch.randn(2, getattr(model, "in_channels", 4), 8, 8), target)
        layer = self.layer(program)
        assert len(layer.reads) == reads

    def test_a_layer_that_reads_two_grids_keeps_a_float(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv = nn.Conv2d(3, 3, 3, padding=1)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.conv(torch.tanh(self.conv(x)))

        program = self.program(Twice(), torch.randn(*IMAGES))
        layer = self.layer(program)
        assert len(layer.reads) == 2
        assert torch.equal(layer.folded_bias(), layer.bias)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_other_dtypes_stay(self, dtype: torch.dtype) -> None:
        x = torch.randn(*IMAGES)
        program = self.program(nn.Conv2d(3, 4, 3), x).to(dtype)
        assert program(x.to(dtype)).dtype is dtype

    def test_a_range_that_is_not_known_yet_rounds_nothing(self) -> None:
        program = captured(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), (torch.randn(*IMAGES),))
        rewrite(QAT(target="onnxruntime"), program)
        layer = self.layer(program)
        assert len(layer.reads) == 1
        assert torch.equal(layer.folded_bias(), layer.bias)


class Noisy(nn.Module):
    """Draws random numbers when it is evaluated too, as variational autoencoders do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return self.last(x + torch.randn_like(x))


class TestPTQ:
    def quantised(self, model: nn.Module, x: torch.Tensor, **options: object) -> torch.Tensor:
        passes = [Fuse(), PTQ(**options)]  # type: ignore[arg-type]
        result = fxopt.optimize(model, x, passes, devices=(), calibration_data=[x])
        self.ledger = result.ledger
        with torch.no_grad():
            return result.module(x)

    def test_equalization_keeps_the_outputs_and_evens_out_the_ranges(self) -> None:
        torch.manual_seed(0)
        model, x = unequal(), torch.randn(8, 3, 9, 9)
        with torch.no_grad():
            wanted = model(x)
        off = {"smooth": 0.0, "correct": False, "per_channel": False}
        without = sqnr(self.quantised(model, x, equalize=False, **off), wanted)
        with_it = sqnr(self.quantised(model, x, equalize=True, **off), wanted)
        assert with_it > without + 6
        assert any("evened out with '2'" in change.what for entry in self.ledger for change in entry.changes)
        sixteen = self.quantised(model, x, bits=16, smooth=0.0, correct=False)
        assert sqnr(sixteen, wanted) > 60

    def test_a_linear_layer_whose_inputs_are_as_many_as_channels_is_no_neighbour_of_a_convolution(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 4)).eval()
        with torch.no_grad():
            model[0].weight[2] *= 30
        x = torch.randn(*IMAGES)
        with torch.no_grad():
            wanted = model(x)
        assert sqnr(self.quantised(model, x, bits=16, smooth=0.0, correct=False), wanted) > 60
        assert not any("evened out" in change.what for entry in self.ledger for change in entry.changes)

    @pytest.mark.parametrize("layer", ["conv", "linear"])
    def test_a_value_that_is_added_too_keeps_its_scale(self, layer: str) -> None:
        class Added(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                conv = layer == "conv"
                self.first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()) if conv else nn.LayerNorm(8)
                self.second = nn.Conv2d(8, 8, 3, padding=1) if conv else nn.Linear(8, 8)
                with torch.no_grad():
                    self.get_submodule("first.0" if conv else "first").get_parameter("weight")[3] *= 80

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = self.first(x)
                return torch.relu(self.second(y) + y)

        torch.manual_seed(0)
        model, x = Added().eval(), torch.randn(*IMAGES)
        with torch.no_grad():
            wanted = model(x)
        assert sqnr(self.quantised(model, x, bits=16, correct=False), wanted) > 60

    def test_smoothing_moves_outliers_into_the_weights(self) -> None:
        torch.manual_seed(0)
        model, x = Outliers().eval(), torch.randn(64, 16)
        with torch.no_grad():
            wanted = model(x)
        off = {"equalize": False, "correct": False}
        without = sqnr(self.quantised(model, x, smooth=0.0, **off), wanted)
        with_it = sqnr(self.quantised(model, x, smooth=0.5, **off), wanted)
        assert with_it > without + 3
        assert any("smoothed into the 2 layers" in change.what for entry in self.ledger for change in entry.changes)

    def test_bias_correction_takes_out_the_mean_error(self) -> None:
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), torch.randn(16, 3, 9, 9)
        with torch.no_grad():
            wanted = model(x).mean((0, 2, 3))
        off = {"equalize": False, "smooth": 0.0, "weights": "int3"}
        errors = [
            (self.quantised(model, x, correct=each, **off).mean((0, 2, 3)) - wanted).abs().max()
            for each in (False, True)
        ]
        assert errors[1] < errors[0] / 5

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_it_keeps_the_dtype_of_the_model(self, dtype: torch.dtype) -> None:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 8), nn.LayerNorm(8))
        model = model.append(nn.Linear(8, 2)).eval().to(dtype)
        x = torch.randn(*IMAGES, dtype=dtype)
        with torch.no_grad():
            wanted = model(x)
        found = self.quantised(model, x)
        assert found.dtype is dtype
        assert sqnr(found, wanted) > 20

    @pytest.mark.parametrize(
        ("layer", "x"), [(nn.Conv2d(3, 4, 3), torch.randn(3, 9, 9)), (nn.Linear(16, 4), torch.randn(16))]
    )
    def test_biases_are_corrected_without_a_batch_too(self, layer: nn.Module, x: torch.Tensor) -> None:
        model = nn.Sequential(layer).eval()
        with torch.no_grad():
            wanted = model(x)
        off = {"equalize": False, "smooth": 0.0, "weights": "int3"}
        errors = [
            (self.quantised(model, x, correct=each, **off) - wanted).unsqueeze(-1).flatten(1).mean(1)
            for each in (False, True)
        ]
        assert errors[1].abs().max() < errors[0].abs().max() / 5

    def test_correcting_leaves_no_trace_of_itself(self) -> None:
        x = torch.randn(8, 3, 8, 8)
        program = captured(Residual().eval(), (x,))
        rewrite(Fuse(), program)
        rewrite(QAT(), program)
        calibrate(program, [x])
        assert correct_biases(program, [fxopt.Inputs.of(x)]) == ("stem", "left", "right", "head")
        assert not any("_affine" in child.__dict__ for child in program.modules())
        assert all(fake.ready for fake in quantizers(program).values())

    def test_correcting_survives_calls_that_rounding_adds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        class Decided(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gate = nn.Linear(1, 1, bias=False)
                self.expert = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.expert(x) if self.gate(x[:1, :1]).item() > 0.4 else x

        model, x = Decided().eval(), torch.ones(2, 4)
        with torch.no_grad():
            model.gate.weight.fill_(0.5)
        program = captured(model, (x,))
        rewrite(QAT(activations="none"), program)
        with torch.no_grad():
            program.get_parameter("gate.weight").fill_(0.3)
        gate = next(fake for name, fake in quantizers(program).items() if name.startswith("gate"))
        monkeypatch.setattr(gate, "forward", lambda weight: weight + 0.2 * gate.ready)
        bias = program.get_parameter("expert.0.bias").detach().clone()
        assert correct_biases(program, [fxopt.Inputs.of(x)]) == ()
        assert torch.equal(program.get_parameter("expert.0.bias"), bias)

    @pytest.mark.parametrize("rounded", [0.3, 0.9])
    def test_correcting_compares_calls_of_one_batch_where_rounding_decides_otherwise(
        self, monkeypatch: pytest.MonkeyPatch, rounded: float
    ) -> None:
        class Chosen(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.gate = nn.Linear(1, 1, bias=False)
                self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.experts[self.gate(x[:1, :1]).item() > 0.4](x)

        model = Chosen().eval()
        with torch.no_grad():
            model.gate.weight.fill_(0.5)
        program = captured(model, (torch.ones(2, 4),))
        rewrite(QAT(weights="int16", activations="none"), program)
        gate = next(fake for name, fake in quantizers(program).items() if name.startswith("gate"))
        monkeypatch.setattr(gate, "forward", lambda weight: weight + (rounded - 0.5) * gate.ready)
        batches = [torch.full((2, 4), scale) for scale in (1.0, 2.0, 0.5, 0.1, 3.0)]  # one of them goes elsewhere
        assert len(correct_biases(program, [fxopt.Inputs.of(batch) for batch in batches])) == 2
        for name, bias in model.named_parameters():
            if name.endswith("bias"):
                assert_close(program.get_parameter(name), bias, 1e-3)

    def test_random_numbers_are_no_error_to_correct(self) -> None:
        program = captured(Noisy().eval(), (torch.randn(64, 8),))
        rewrite(QAT(weights="int16", activations="none"), program)
        before = copy.deepcopy(program.state_dict())
        correct_biases(program, [fxopt.Inputs.of(torch.randn(64, 8))])
        assert_close(program.state_dict(), before, 1e-3)

    def test_an_empty_batch_for_a_layer_moves_nothing(self) -> None:
        class Chosen(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.expert = nn.Linear(4, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.expert(x[x[:, 0] > 100])

        x = torch.randn(3, 4)
        program = captured(Chosen().eval(), (x,))
        rewrite(QAT(activations="none"), program)
        correct_biases(program, [fxopt.Inputs.of(x)])
        assert program.get_parameter("expert.bias").isfinite().all()

    def test_without_data_it_says_what_to_give(self) -> None:
        with pytest.raises(PassError, match="ptq: there is no calibration data; give `calibration_data"):
            fxopt.optimize(Residual().eval(), torch.randn(*IMAGES), [PTQ()], devices=())

    def test_data_that_a_model_with_a_norm_does_not_take_is_named(self) -> None:
        with pytest.raises(PassError, match=r"ptq: the module does not take batch 1 \(4x9 float32\).* without labels"):
            fxopt.optimize(
                Outliers().eval(), torch.randn(4, 16), [PTQ()], devices=(), calibration_data=[torch.randn(4, 9)]
            )

    def test_it_and_qat_exclude_each_other(self) -> None:
        with pytest.raises(SpecError, match="can't be in one pipeline"):
            fxopt.optimize(Residual().eval(), torch.randn(*IMAGES), "qat,ptq", devices=())


def prepared(model: nn.Module, inputs: tuple[torch.Tensor, ...], **options: object) -> GraphModule:
    program = captured(model, inputs)
    rewrite(Fuse(), program)
    rewrite(QAT(**options), program)  # type: ignore[arg-type]
    program.eval()
    calibrate(program, [inputs])
    return program


MODELS: dict[str, Callable[[], nn.Module]] = {
    "folded": lambda: Residual().eval(),
    "joined": lambda: nn.Sequential(ConvBlock(3, 8), ConvBlock(8, 4), nn.Flatten(), nn.Linear(256, 3)).train(),
}


class TestSensitivity:
    def test_the_costliest_comes_first(self) -> None:
        torch.manual_seed(0)
        x = torch.randn(8, 3, 8, 8)
        program = prepared(Residual().eval(), (x,))
        coarse = program.get_submodule("left.weight_fake_quant")
        assert isinstance(coarse, FakeQuantize)
        coarse.scale.mul_(12)
        before = copy.deepcopy(program.state_dict())
        ranked = sensitivity(program, [x])
        assert ranked[0].name == "left"
        assert ranked[0].sqnr_db < ranked[1].sqnr_db - 3
        assert {one.name for one in ranked} == {"stem", "left", "right", "head"}
        assert_close(program.state_dict(), before, 0)
        assert all(fake.ready for fake in quantizers(program).values())

    def test_random_numbers_are_no_error(self) -> None:
        torch.manual_seed(0)
        x = torch.randn(64, 8)
        assert all(one.sqnr_db > 30 for one in sensitivity(prepared(Noisy().eval(), (x,)), [x]))

    def test_data_that_the_module_does_not_take_is_named(self) -> None:
        program = prepared(Noisy().eval(), (torch.randn(4, 8),))
        with pytest.raises(PassError, match=r"sensitivity: the module does not take batch 1 .* without labels"):
            sensitivity(program, [(torch.randn(4, 8), torch.zeros(4))])

    def test_needs_ranges_and_data(self) -> None:
        with pytest.raises(PassError, match="no quantiser has a range"):
            sensitivity(nn.Linear(2, 2), [torch.zeros(1, 2)])
        with pytest.raises(PassError, match="the data is empty"):
            sensitivity(prepared(Residual().eval(), (torch.randn(*IMAGES),)), [])


TOKENS = torch.arange(12).view(2, 6)
TIED: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "the same rows": lambda x, table: F.linear(x, table),
    "rows and columns": lambda x, table: F.linear(x, table).relu() @ table,
    "rows and a float": lambda x, table: F.linear(x, table.square()),
    "columns and a float": lambda x, table: x[..., :4] @ table[:4, :4] + (x @ table.t()).sum(),
}


class Tied(nn.Module):
    """A table that is looked up, and read by a function."""

    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.embed, self.function = nn.Embedding(12, 8), function

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.function(self.embed(tokens), self.embed.weight)


class TestFreeze:
    def test_what_only_observes_is_refused(self) -> None:
        program = prepared(Residual().eval(), (torch.randn(*IMAGES),))
        QATSchedule(program, quantize_from=3)
        with pytest.raises(PassError, match=r"'stem.weight_fake_quant' only observes as yet.* `quantize_from`"):
            rewrite(QuantizeFreeze(), program)

    @pytest.mark.parametrize(
        "options", [{}, {"learned": "lsq"}, {"weights": "int4"}, {"target": "onnxruntime"}], ids=str
    )
    @pytest.mark.parametrize("name", MODELS)
    def test_outputs_stay_and_weights_lie_on_the_grid(self, name: str, options: dict[str, object]) -> None:
        torch.manual_seed(0)
        x = torch.randn(4, *IMAGES[1:])
        program = prepared(MODELS[name](), (x,), **options)
        with torch.no_grad():
            simulated = program(x)
            outcome = rewrite(QuantizeFreeze(), program)
            assert torch.equal(outcome.module(x), simulated)
        assert all(fake.state is State.FROZEN for fake in quantizers(program).values())
        for layer in program.modules():
            if isinstance(layer, Fused):
                assert layer.bn is None
                assert layer.weight_fake_quant is not None
                assert_close(layer.weight_fake_quant(layer.weight), layer.weight, 1e-6)
                assert not isinstance(layer.weight_fake_quant.scale, nn.Parameter)
        assert not rewrite(QuantizeFreeze(), program).changes
        restored = pickle.loads(pickle.dumps(program))
        assert_close(restored(x), program(x), 0)

    @pytest.mark.parametrize("learned", [False, "lsq"])
    def test_ranges_that_rested_in_training_are_frozen_like_others(self, learned: str | bool) -> None:
        class Both(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block = ConvBlock(3, 4)
                self.weight = nn.Parameter(torch.randn(5, 4))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return F.linear(self.block(x).mean((2, 3)), self.weight)

        program, x = captured(Both().train(), (torch.randn(*IMAGES),)), torch.randn(*IMAGES)
        rewrite(Fuse(), program)
        rewrite(QAT(learned=learned), program)  # type: ignore[arg-type]
        program(x)
        QATSchedule(program, freeze_ranges_at=0)
        scales = [fake.scale for fake in quantizers(program).values()]
        assert not any(scale.requires_grad for scale in scales)
        program.eval()
        with torch.no_grad():
            simulated = program(x)
            assert rewrite(QuantizeFreeze(), program).changes
            assert torch.equal(program(x), simulated)
        layer = next(child for child in program.modules() if isinstance(child, Fused))
        assert layer.bn is None and layer.weight_fake_quant is not None
        assert torch.equal(layer.weight_fake_quant(layer.weight), layer.weight)
        assert torch.equal(program.get_submodule("weight_fake_quant.weight")(program.weight), program.weight)
        assert not any(isinstance(fake.scale, nn.Parameter) for fake in quantizers(program).values())
        assert not rewrite(QuantizeFreeze(), program).changes

    def test_a_channel_that_its_norm_switched_off_stays_off(self) -> None:
        model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(*IMAGES)
        nn.init.zeros_(model[1].weight[1:2])
        nn.init.normal_(model[1].bias)
        program = captured(model.train(), (x,))
        rewrite(Fuse(), program)
        rewrite(QAT(), program)
        program(x)
        program.eval()
        with torch.no_grad():
            simulated = program(x)
            rewrite(QuantizeFreeze(), program)
            assert torch.equal(program(x), simulated)
            assert_close(simulated[:, 1], model[1].bias[1].expand_as(simulated[:, 1]))

    def test_functions_of_parameters_too(self) -> None:
        class Functional(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.weight = nn.Parameter(torch.randn(4, 4))

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return F.relu(F.linear(x, self.weight))

        x = torch.randn(3, 4)
        model = Functional().eval()
        program = prepared(model, (x,))
        simulated = program(x)
        rewrite(QuantizeFreeze(), program)
        assert_close(program(x), simulated)
        fake = program.get_submodule("weight_fake_quant.weight")
        assert_close(fake(program.weight), program.weight, 1e-6)
        assert not torch.equal(program.weight, model.weight)

    @pytest.mark.parametrize(
        "options", [{}, {"weights": "int4"}, {"per_channel": False}, {"include": "embed"}], ids=str
    )
    @pytest.mark.parametrize("name", TIED)
    def test_a_weight_that_is_read_twice_stays_what_each_reader_rounds(
        self, name: str, options: dict[str, object]
    ) -> None:
        torch.manual_seed(0)
        program, tokens = captured(Tied(TIED[name]).eval(), (TOKENS,)), TOKENS
        rewrite(QAT(**options), program)  # type: ignore[arg-type]
        calibrate(program, [tokens])
        with torch.no_grad():
            simulated = program(tokens)
            frozen = rewrite(QuantizeFreeze(), program)
            assert torch.equal(program(tokens), simulated)
            table = program.get_parameter("embed.weight")
            lies = torch.equal(program.get_submodule("embed.weight_fake_quant")(table), table)
        (what,) = (change.what for change in frozen.changes if change.where == "embed")
        assert what.startswith("weight on the grid" if lies else "weight rounded to int")
        assert not rewrite(QuantizeFreeze(), program).changes

    def test_a_norm_stays_whose_layer_has_a_weight_that_is_read_otherwise_too(self) -> None:
        class Penalised(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.block = ConvBlock(3, 4)

            def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return self.block(x), self.block.conv.weight.square().sum()

        x = torch.randn(*IMAGES)
        program = captured(Penalised().train(), (x,))
        rewrite(Fuse(), program)
        rewrite(QAT(), program)
        for _ in range(3):
            program(x)
        simulated = program.eval()(x)
        outcome = rewrite(QuantizeFreeze(), program)
        assert any("its batch norm is not folded" in reason for reason in outcome.reasons)
        assert_close(program(x), simulated, 0)

    def test_tied_layers_stay_tied(self) -> None:
        program = captured(TiedHead().eval(), (TOKENS,))
        rewrite(QAT(), program)
        calibrate(program, [TOKENS])
        rewrite(QuantizeFreeze(), program)
        assert program.get_parameter("head.weight") is program.get_parameter("embed.weight")

    def test_what_never_observed_is_taken_out_by_name(self) -> None:
        program = captured(Residual().eval(), (torch.randn(*IMAGES),))
        rewrite(QAT(), program)
        outcome = rewrite(QuantizeFreeze(), program)
        assert sum("never observed anything" in reason for reason in outcome.reasons) == 4
        assert not any("input_fake_quant" in name for name in outcome.calls)

    def test_a_model_in_training_mode_is_refused(self) -> None:
        program = captured(ConvBlock(3, 4).train(), (torch.randn(*IMAGES),))
        rewrite(QAT(), program)
        outcome = rewrite(QuantizeFreeze(), program)
        assert not outcome.changes
        assert "call .eval() on it before it is frozen" in outcome.reasons[0]

    def test_nothing_quantised_is_an_error(self) -> None:
        with pytest.raises(PassError, match="nothing is quantised; put 'qat' or 'ptq' before it"):
            fxopt.optimize(Residual().eval(), torch.randn(*IMAGES), [QuantizeFreeze()], devices=())

    def test_what_ptq_left_alone_in_training_mode_is_named(self) -> None:
        x = torch.randn(*IMAGES)
        with pytest.raises(PassError, match="a model in training mode is left alone by 'ptq': call"):
            fxopt.optimize(Residual().train(), x, [PTQ(), QuantizeFreeze()], devices=(), calibration_data=[x])

    def test_what_is_frozen_is_not_calibrated_again(self) -> None:
        x = torch.randn(*IMAGES)
        program = prepared(Residual().eval(), (x,))
        rewrite(QuantizeFreeze(), program)
        with pytest.raises(PassError, match="is frozen, its range is final"):
            calibrate(program, [x])
