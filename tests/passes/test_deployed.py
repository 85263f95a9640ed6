"""Every model that a graph can hold whole: prepared, trained, frozen, exported, and run on integers by onnxruntime."""

from __future__ import annotations

import pytest
import torch

import fxopt
from fxopt.inputs import Inputs
from passes import QAT, Fuse, QuantizeFreeze
from passes.qat import calibrate
from tests.models import STATIC
from tests.passes.programs import assert_close, captured, leaves, rewrite

_NOTHING_TO_QUANTISE = {"holder", "normalized_linear"}
_DECIBELS = 40.0
"""A sum between two steps may be rounded either way."""


@pytest.mark.parametrize("name", STATIC)
def test_a_trained_model_runs_on_integers_as_it_was_simulated(name: str) -> None:
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    case = STATIC[name]
    inputs = Inputs(case.example(), case.kwargs)
    program = captured(case.build(), inputs.args, inputs.kwargs)
    rewrite(Fuse(), program)
    changes = rewrite(QAT(target="onnxruntime"), program).changes
    assert bool(changes) is (name not in _NOTHING_TO_QUANTISE)
    if not changes:
        return
    calibrate(program, [inputs])
    optimizer = torch.optim.SGD([each for each in program.parameters() if each.requires_grad], 1e-4)
    for _ in range(20):
        optimizer.zero_grad()
        sum(out.square().mean() for out in leaves(program(*inputs.args, **inputs.kwargs))).backward()  # type: ignore[union-attr]
        optimizer.step()
    program.eval()
    with torch.no_grad():
        trained = program(*inputs.args, **inputs.kwargs)
        rewrite(QuantizeFreeze(), program)
        simulated = program(*inputs.args, **inputs.kwargs)
        assert_close(simulated, trained, 1e-3)
    deployed = fxopt.lower(program, inputs, engine="onnxruntime")(*inputs.args, **inputs.kwargs)
    for found, wanted in zip(leaves(deployed), leaves(simulated), strict=True):
        noise = (found - wanted).square().mean().clamp(min=1e-20)
        assert 10 * torch.log10(wanted.square().mean() / noise) > _DECIBELS
