"""The run on this machine's own GPU, beside the one on the CPU. Without a GPU, torch's meta device stands for it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxopt.findings import Subject
from fxopt.inputs import Inputs
from passes.audit import Audit
from passes.audit.evidence import Evidence, real_device

STRAY = torch.ones(8)


class FailsThere(nn.Module):
    """The fake-device run takes `item` for a value that it does not have."""

    def forward(self, x):
        return x * (1 if x.device.type == "cpu" else STRAY.to(x.device).sum().item())


class OtherThere(nn.Linear):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x) * (1 + 0.1 * (self.calls > 1))


def subject(module: nn.Module) -> Subject:
    return Subject("model", module.eval(), Inputs((torch.randn(4, 8),)))


def test_what_fails_there_is_found_at_its_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(real_device, "DEVICE", torch.device("meta"))
    monkeypatch.setattr(Evidence, "meetings", [])
    found = [each for each in Audit().inspect(subject(FailsThere())).findings if each.rule == "FX203"]
    assert [each.message.partition(" raises ")[0] for each in found] == ["it runs on the CPU, and on meta the forward"]
    assert found[0].place is not None
    assert found[0].place.path == __file__


def test_other_outputs_there_are_noted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(real_device, "DEVICE", torch.device("cpu"))
    with Evidence(subject(OtherThere(8, 8))) as evidence:
        assert evidence.on_gpu is not None
        assert evidence.on_gpu.difference == pytest.approx(0.1, rel=1e-3)
        assert evidence.notes == ["model: on cpu the outputs differ by 1.0e-01 from the CPU's"]


def test_without_a_gpu_there_is_no_such_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with Evidence(subject(nn.Linear(8, 8))) as evidence:
        assert evidence.on_gpu is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_sound_model_is_the_same_on_the_gpu():
    with Evidence(subject(nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1)))) as evidence:
        assert evidence.on_gpu is not None
        assert evidence.on_gpu.error == ""
        assert evidence.on_gpu.difference < 1e-4
