"""Every model: prepared, trained, frozen, and run on integers by onnxruntime, or refused with the reason."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn

import fxopt
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.modules import FakeQuantize, State
from passes import QAT, Fuse, QuantizeFreeze
from passes.qat import calibrate
from passes.qat.targets import Target
from tests.models import DYNAMIC, STATIC, Case
from tests.passes.programs import assert_close, captured, leaves, rewrite

_NOTHING_TO_QUANTISE = {"holder", "normalized_linear"}
_DECIBELS = 100.0
"""No value falls to another step: what differs is the order in which floats are added."""
_NO_GRAPH = {
    "router": "onnxruntime.* torch cannot export one: GuardOnDataDependent",
    "mixture": "onnxruntime.* torch cannot export one: GuardOnDataDependent",
    "early_exit": "onnxruntime.* gives dense tensors of real numbers that NumPy knows, not 13",
}
"""Python decides while they run: no file could hold them."""


@pytest.mark.parametrize("name", [*STATIC, *sorted(DYNAMIC.keys() - _NO_GRAPH)])
def test_a_trained_model_runs_on_integers_as_it_was_simulated(name: str) -> None:
    pytest.importorskip("onnxruntime")
    case = {**STATIC, **DYNAMIC}[name]
    inputs = Inputs(case.example(), case.kwargs)
    program = prepared(case, [inputs])
    assert has_quantisers(program) is (name not in _NOTHING_TO_QUANTISE)
    if name in _NOTHING_TO_QUANTISE:
        return
    simulated = trained_and_frozen(program, inputs, training=name in DYNAMIC)
    assert_deployed(program, inputs, simulated)


@pytest.mark.parametrize("bits", [4, 3])
def test_narrow_integers_run_as_they_were_simulated(bits: int) -> None:
    pytest.importorskip("onnxruntime")
    case = STATIC["staged_cnn"]
    inputs = Inputs(case.example(), case.kwargs)
    program = prepared(case, [inputs], weights=f"int{bits}", activations="uint4", learned="lsq")
    assert_deployed(program, inputs, trained_and_frozen(program, inputs, training=False))


@pytest.mark.parametrize("weight", [0.0, 1e-9])
def test_a_dead_channel_gives_its_bias(weight: float) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight[1] = weight
        model[0].bias[1] = 2.0
    inputs = Inputs((torch.rand(2, 3, 8, 8),))
    program = captured(model, inputs.args)
    rewrite(QAT(target="onnxruntime"), program)
    calibrate(program, [inputs])
    rewrite(QuantizeFreeze(), program)
    with torch.no_grad():
        simulated = [program(*inputs.args)]
        assert_close(simulated[0], model(*inputs.args), 0.1)
    assert_deployed(program, inputs, simulated)


@pytest.mark.parametrize(
    ("layer", "per_channel", "target"),
    [
        (nn.Conv2d, True, "onnxruntime"),
        (nn.Conv2d, False, "generic"),
        (nn.ConvTranspose2d, True, "generic"),
    ],
)
def test_a_bias_far_above_the_weights_of_its_channel_overflows_nowhere(
    layer: type[nn.Module], per_channel: bool, target: Target
) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), layer(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[2].weight *= 1e-4
        model[2].bias[1] = 1e4
    inputs = Inputs((torch.rand(2, 3, 8, 8),))
    program = captured(model, inputs.args)
    rewrite(QAT(target=target, per_channel=per_channel), program)
    calibrate(program, [inputs])
    rewrite(QuantizeFreeze(), program)
    with torch.no_grad():
        assert_deployed(program, inputs, [program(*inputs.args)])


@pytest.mark.parametrize("name", _NO_GRAPH)
def test_a_model_whose_python_decides_is_trained_frozen_and_refused_with_the_reason(name: str) -> None:
    pytest.importorskip("onnxruntime")
    case = DYNAMIC[name]
    inputs = Inputs(case.example())
    program = prepared(case, [Inputs(case.example(seed)) for seed in range(1, 9)])
    trained_and_frozen(program, inputs, training=True)
    quantisers = [child for child in program.modules() if isinstance(child, FakeQuantize) and child.ready]
    assert {child.state for child in quantisers} == {State.FROZEN}
    with pytest.raises(EngineError, match=_NO_GRAPH[name]):
        fxopt.lower(program, inputs, engine="onnxruntime")


def assert_deployed(program: GraphModule, inputs: Inputs, simulated: list[torch.Tensor]) -> None:
    deployed = fxopt.lower(program, inputs, engine="onnxruntime")(*inputs.args, **inputs.kwargs)
    for found, wanted in zip(leaves(deployed), simulated, strict=True):
        noise = (found - wanted).square().mean().clamp(min=1e-20)
        assert 10 * torch.log10(wanted.square().mean() / noise) > _DECIBELS


def prepared(case: Case, data: Sequence[Inputs], **options: object) -> GraphModule:
    """The model with quantisers that have seen `data`, where there is anything to quantise."""
    torch.manual_seed(0)
    program = captured(case.build(), data[0].args, data[0].kwargs)
    rewrite(Fuse(), program)
    rewrite(QAT(target="onnxruntime", **options), program)  # type: ignore[arg-type]
    if has_quantisers(program):
        calibrate(program, data)
    return program


def has_quantisers(program: GraphModule) -> bool:
    return any(isinstance(child, FakeQuantize) for child in program.modules())


def trained_and_frozen(program: GraphModule, inputs: Inputs, training: bool) -> list[torch.Tensor]:
    """Twenty steps, then the outputs of the frozen model, which are those of the trained one, bit by bit."""
    optimizer = torch.optim.SGD([each for each in program.parameters() if each.requires_grad], 1e-4)
    program.train(training)
    for _ in range(20):
        optimizer.zero_grad()
        sum(out.square().mean() for out in leaves(program(*inputs.args, **inputs.kwargs))).backward()  # type: ignore[union-attr]
        optimizer.step()
    program.eval()
    with torch.no_grad():
        trained = program(*inputs.args, **inputs.kwargs)
        rewrite(QuantizeFreeze(), program)
        simulated = program(*inputs.args, **inputs.kwargs)
    assert_close(simulated, trained, 0)
    return leaves(simulated)
