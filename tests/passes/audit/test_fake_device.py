"""The run on a device that does not exist goes to the end, and beside others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from fxopt.findings import Subject
from fxopt.inputs import Inputs
from passes.audit.evidence import Evidence


class MadeEmpty(nn.Module):
    """As the key-value caches of transformers begin."""

    def forward(self, x):
        return torch.cat([torch.tensor([], dtype=x.dtype, device=x.device), x.flatten()])


class Late(nn.Module):
    """A mismatch behind the operator that had no fake kernel."""

    def __init__(self, first):
        super().__init__()
        self.first = first

    def forward(self, x):
        return self.first(x)[0] + torch.ones(8)


@torch.library.custom_op("fxopt_tests::halves", mutates_args=())
def halves(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Has no fake kernel."""
    return x[: len(x) // 2].clone(), x[len(x) // 2 :].clone()


class Halves(nn.Module):
    def forward(self, x):
        return torch.cat(halves(x))


class Autocasts(nn.Module):
    """Asks for autocast on the device of its input, as many models do to leave it."""

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=False):
            return x * 2


MODELS = {
    "autocast": Autocasts(),
    "gru": nn.GRU(8, 8),
    "lstm": nn.LSTM(8, 8),
    "rnn": nn.RNN(8, 8),
    "torch.tensor there": MadeEmpty(),
    "no fake kernel": Halves(),
}


@pytest.mark.parametrize("name", MODELS)
def test_it_goes_to_the_end(name):
    with Evidence(Subject(name, MODELS[name], Inputs((torch.randn(3, 2, 8),)))) as evidence:
        assert evidence.meetings == []
        assert evidence.notes == []


def test_what_comes_after_a_gru_is_seen():
    with Evidence(Subject("x", Late(nn.GRU(8, 8)), Inputs((torch.randn(3, 2, 8),)))) as evidence:
        (meeting,) = evidence.meetings
    assert meeting.operator == "add"
    assert meeting.made is not None and meeting.made.path == __file__


def _children() -> set[str]:
    """Process ids of what this process started, be it by whatever test."""
    listed = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return {pid for file in listed for pid in file.read_text().split()}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_no_process_is_left_behind():
    before = _children()
    with Evidence(Subject("x", nn.Linear(8, 8), Inputs((torch.randn(2, 8),)))):
        pass
    assert _children() <= before
