"""What tests of several parts share: model files, written for one test each."""

from __future__ import annotations

import os
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch

with warnings.catch_warnings():
    # Importing torch's compiler warns of deprecated parts of torch, as any test that compiles would be the first to do.
    warnings.simplefilter("ignore")
    import torch._inductor.config

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; threads of their own would only wait for each other.
    torch.set_num_threads(1)

NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.fc = nn.Linear(3, width)
    def forward(self, x):
        return self.fc(x)
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Writes `NET` and further lines to a file, and goes to its directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def write(source: str, name: str = "model.py", header: str = NET) -> str:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(header + textwrap.dedent(source))
        return name

    yield write
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]
