"""Random small modules: control flow on shapes, nested inputs, in-place writes, shared submodules."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fxopt.capture import capture
from fxopt.errors import GuardError
from tests.capture.agree import assert_same, step

WIDTH = 6


class Random(nn.Module):
    """Runs a list of steps, each a name and a number."""

    def __init__(self, steps: list[tuple[str, int]]):
        super().__init__()
        self.steps = steps
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.norms = nn.ModuleList([nn.BatchNorm1d(WIDTH), nn.LayerNorm(WIDTH)])
        self.blocks = nn.ModuleList([nn.Sequential(self.layers[0], nn.Tanh()), nn.Dropout(0.3)])
        self.register_buffer("total", torch.zeros(WIDTH))
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, data: dict[str, Any], scale: float = 1.0) -> Any:
        x, others = data["x"], list(data["others"])
        for name, number in self.steps:
            x = getattr(self, f"_{name}")(x, others, number)
        return {"x": x * scale, "others": (others[0], [len(others), x.shape[0]])}

    def _layer(self, x, others, number):
        return self.layers[number](x)

    def _norm(self, x, others, number):
        return self.norms[number % 2](x)

    def _block(self, x, others, number):
        return self.blocks[number % 2](x)

    def _drop(self, x, others, number):
        return F.dropout(x, 0.1 * number, self.training)

    def _by_mode(self, x, others, number):
        return x + torch.rand_like(x) if self.training else x * self.gain

    def _by_rows(self, x, others, number):
        return x + 1 if x.shape[0] > number + 2 else x - self.gain

    def _repeat(self, x, others, number):
        for row in range(x.size(1) // 2 - number):
            x = x + row
        return x

    def _write(self, x, others, number):
        y = x.clone()
        y[:, number] = 0
        y[number:].mul_(2)
        y += 1
        return y

    def _buffer(self, x, others, number):
        self.total += x.detach().mean(0)
        return x + self.total

    def _assign(self, x, others, number):
        self.total = self.total * 0.5 + number
        return x - self.total

    def _other(self, x, others, number):
        others.append(x * number)
        return x + others[number % len(others)][: x.shape[0]]

    def _positions(self, x, others, number):
        return x + torch.arange(x.shape[0], dtype=x.dtype).unsqueeze(1) / (x.shape[0] + number)

    def _reshape(self, x, others, number):
        batch, width = x.shape
        return x.view(batch, 2, width // 2).transpose(1, 2).reshape(len(x), -1)

    def _each(self, x, others, number):
        return torch.stack([row + number * index for index, row in enumerate(x)])

    def _parts(self, x, others, number):
        return x + sum(part.mean() for part in x.split(2 + number)) + len(x.chunk(4))

    def _squeezed(self, x, others, number):
        return x + x[:, : x.shape[0] - 2].squeeze().dim()

    def _numbers(self, x, others, number):
        return x + len(torch.arange(x.shape[0]).tolist()) + {"4": 2}.get(str(len(x)), number)

    def _mask(self, x, others, number):
        return x.masked_fill(x > 0.5 * number, 0.0)

    def _item(self, x, others, number):
        return x * 2 if x.detach().sum().item() > number else x


NAMES = [name[1:] for name in vars(Random) if name.startswith("_") and not name.startswith("__")]


def inputs(rows: int, seed: int) -> tuple[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    x, one, two = (torch.randn(rows, WIDTH, generator=generator) for _ in range(3))
    return ({"x": x, "others": [one, two]},)


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    steps=st.lists(st.tuples(st.sampled_from(NAMES), st.integers(0, 2)), min_size=1, max_size=6),
    training=st.booleans(),
    rows=st.integers(2, 5),
)
def test_eager_and_captured_agree_at_all_sizes_in_both_modes(steps, training, rows):
    torch.manual_seed(0)
    module = Random(steps).train(training)
    captured = capture(module, inputs(rows, 0), {"scale": 0.5}).module
    assert list(captured.state_dict()) == list(module.state_dict())
    for mode in (training, not training):
        module.train(mode)
        captured.train(mode)
        for other in (rows, 4, 7, 3):
            before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            try:
                actual = step(captured, inputs(other, other), {"scale": 2.0})
            except GuardError:
                # Its own promise is to refuse: never for the sizes and the mode of the example.
                assert (other, mode) != (rows, training)
                captured.load_state_dict(before)
                continue
            assert_same(step(module, inputs(other, other), {"scale": 2.0}), actual)
