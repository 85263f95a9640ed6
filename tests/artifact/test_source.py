"""The code of the graphs reads well, and is Python."""

from __future__ import annotations

import torch
from torch import nn

from fxopt.artifact.save import fingerprint
from fxopt.artifact.source import source
from fxopt.capture import capture


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x):
        return torch.nn.functional.softmax(self.layers(x) * self.scale, -1).to(torch.float64)


def test_it_is_python_with_the_lines_of_the_model():
    code = source(capture(Net(), (torch.randn(2, 3),)).module, "model.py", 'lora{targets="\\\\d"}')
    compile(code, "graph.py", "exec")
    exec(code, {})
    assert "class Net:\n    def forward(self, x):\n" in code
    assert "self.layers[0](x)  # test_source.py:" in code
    assert ";" not in code.partition("class")[2]
    assert 'lora{targets="\\\\d"}' in code


def test_the_same_graph_has_the_same_fingerprint():
    first, second = (capture(Net(), (torch.randn(2, 3),)).module for _ in range(2))
    assert fingerprint(first) == fingerprint(second)
    class_of_other = type("Other", (Net,), {"forward": lambda self, x: self.layers(x)})
    assert fingerprint(capture(class_of_other(), (torch.randn(2, 3),)).module) != fingerprint(first)
