"""Graphs of what opaque code calls: as many as hold."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import nn

from fxopt.capture import capture
from fxopt.capture.below import put_what_holds
from fxopt.graph import GraphModule


class Greedy(nn.Module):
    """Decodes until all samples have ended, and calls its embedding with matrices and with vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.before, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        state = self.before(self.table(ids)).mean(1)
        for _ in range(5):
            token = self.out(state).argmax(-1)
            if bool((token == 1).all()):
                break
            state = torch.tanh(state + self.table(token))
        return state


def test_what_one_graph_cannot_take_leaves_the_others_graphs() -> None:
    model, x = Greedy().eval(), torch.randint(20, (3, 4))
    captured = capture(model, (x,))
    module = captured.module
    assert all(isinstance(module.get_submodule(name), GraphModule) for name in ("before", "out"))
    assert type(module.get_submodule("table")) is nn.Embedding
    assert any(
        note.startswith("what 'Greedy' calls is a graph but for 'table': as one, it ") for note in captured.notes
    )
    with torch.no_grad():
        assert torch.equal(module(x), model(x))


def test_what_breaks_the_whole_is_found_by_halves() -> None:
    parent = nn.Sequential(*(nn.Identity() for _ in range(32)))
    graphs: dict[str, nn.Module] = {str(place): nn.ReLU() for place in range(32)}
    graphs["9"] = graphs["8"]  # one graph under two names
    tried = 0

    def holds() -> bool:
        nonlocal tried
        tried += 1
        return not isinstance(parent[8], nn.ReLU) and not isinstance(parent[30], nn.ReLU)

    assert put_what_holds(parent, graphs, holds) == ("8", "9", "30")
    assert sum(isinstance(child, nn.ReLU) for child in parent) == 29
    assert tried < 32


def test_to_measure_what_stays_opaque_imports_no_compiler():
    code = "import sys; from fxopt import capture; from tests.models import DYNAMIC as models; "
    code += "case = models['early_exit']; assert capture(case.build(), case.example()).opaque; "
    code += "sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class ByMode(nn.Module):
    """Takes another path in training."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) * 2 if self.training else self.fc(x)


class ByValue(nn.Module):
    """Code that no graph holds, around a part that was captured before."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x) if x.sum() > 0 else -self.part(x)


class Dropping(ByValue):
    def __init__(self, part):
        super().__init__(ByValue(part))

    def forward(self, x):
        return nn.functional.dropout(self.part(x), 0.5, self.training)


def test_a_part_that_was_captured_before_keeps_the_graph_of_its_mode():
    x = torch.ones(2, 4)
    module = Dropping(capture(ByMode().eval(), (x,)).module).eval()
    expected = module(x)
    assert torch.equal(capture(module, (x,)).module(x), expected)
    assert torch.equal(module(x), expected)


class Signed(nn.Module):
    """Weights of its own, and no layers."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        y = x @ self.weight
        return y if y.sum() > 0 else -y


def test_coverage_counts_what_opaque_code_multiplies_itself_and_takes_layers_of_torch_for_shown():
    alone = capture(Signed(), (torch.ones(2, 4),)).coverage
    assert (alone.flops, alone.parameters) == (0, 0)
    beside = capture(nn.Sequential(nn.Linear(4, 4, bias=False), Signed()), (torch.ones(2, 4),)).coverage
    assert (beside.flops, beside.parameters) == (0.5, 0.5)
    layer = nn.TransformerEncoderLayer(4, 1, 4, dropout=0.0, batch_first=True)
    share = sum(parameter.numel() for parameter in layer.parameters())
    deep = capture(nn.Sequential(layer, Signed()), (torch.ones(2, 3, 4),)).coverage
    assert deep.parameters == share / (share + 16)
