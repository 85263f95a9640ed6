"""Capture without values."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fxopt.capture import capture
from tests.capture.agree import assert_same
from tests.models import DYNAMIC, STATIC


@pytest.mark.parametrize("name", STATIC)
def test_static_models_are_captured_as_with_values(name):
    case = STATIC[name]
    module = case.build()
    real, fake = (capture(module, case.example(), case.kwargs, fake=fake) for fake in (False, True))
    assert fake.opaque == ()
    assert fake.module.code == real.module.code
    assert not any(isinstance(t, FakeTensor) for t in (*fake.module.parameters(), *fake.module.buffers()))
    if not fake.constants:
        assert_same(module(*case.example(), **case.kwargs), fake.module(*case.example(), **case.kwargs))


@pytest.mark.parametrize("place", ["meta", "fake"])
def test_without_weights(place):
    case = STATIC["staged_cnn"]
    with torch.device("meta") if place == "meta" else FakeTensorMode():
        module = case.factory().eval()
    captured = capture(module, case.example(), fake=True)
    assert captured.opaque == ()
    assert {parameter.device.type for parameter in captured.module.parameters()} == {"meta"}
    assert list(captured.module.state_dict()) == list(module.state_dict())
    weights = case.build()
    captured.module.load_state_dict(weights.state_dict(), assign=True)
    assert_same(weights(*case.example()), captured.module(*case.example()))


@pytest.mark.parametrize("name", ["router", "mixture", "early_exit"])
def test_what_needs_values_is_opaque(name):
    case = DYNAMIC[name]
    captured = capture(case.build(), case.example(), fake=True)
    assert [opaque.path for opaque in captured.opaque] == [""]
    assert "it needs values, which fake tensors don't have" in captured.opaque[0].reason
    assert captured.opaque[0].location.startswith("models.py:")
    assert_same(case.build()(*case.example()), captured.module(*case.example()))


def test_an_error_of_the_model_stays():
    with pytest.raises(RuntimeError, match=r"mat1 and mat2 shapes|a and b must have same reduction dim"):
        capture(nn.Linear(4, 4), (torch.randn(2, 5),), fake=True)
