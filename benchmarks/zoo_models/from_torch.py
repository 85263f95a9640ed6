"""torch.nn's own networks, each inside of a module that calls it, so that it is not the root."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from fxopt.inputs import Inputs
from zoo_models.specimen import Built, Specimen


class Calls(nn.Module):
    """Calls one module between two layers."""

    def __init__(self, inner: nn.Module, width: int = 32, with_itself: int = 1, **options: Any):
        super().__init__()
        self.before = nn.Linear(width, width)
        self.inner = inner
        self.with_itself = with_itself
        self.options = options

    def forward(self, x: torch.Tensor) -> Any:
        """Run the three."""
        x = self.before(x)
        return self.inner(*[x] * self.with_itself, **self.options)


def specimens() -> Iterator[Specimen]:
    """All of them."""
    layer = functools.partial(nn.TransformerEncoderLayer, 32, 4, 64, batch_first=True)
    table: dict[str, Callable[[], nn.Module]] = {
        "Transformer": lambda: Calls(nn.Transformer(32, 4, 2, 2, 64, batch_first=True), with_itself=2),
        "TransformerEncoder": lambda: Calls(nn.TransformerEncoder(layer(), 2)),
        "TransformerEncoder (norm first)": lambda: Calls(
            nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, norm_first=True, batch_first=True), 2)
        ),
        "TransformerDecoder": lambda: Calls(
            nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 2), with_itself=2
        ),
        "LSTM": lambda: Calls(nn.LSTM(32, 24, 2, batch_first=True, bidirectional=True)),
        "GRU": lambda: Calls(nn.GRU(32, 24, 2, batch_first=True)),
        "RNN": lambda: Calls(nn.RNN(32, 24, batch_first=True)),
        "MultiheadAttention": lambda: Calls(nn.MultiheadAttention(32, 4, batch_first=True), with_itself=3),
        "MultiheadAttention (no weights)": lambda: Calls(
            nn.MultiheadAttention(32, 4, batch_first=True), with_itself=3, need_weights=False
        ),
        "Transformer (as root)": lambda: nn.Transformer(32, 4, 2, 2, 64, batch_first=True),
        "LSTM (as root)": lambda: nn.LSTM(32, 24, 2, batch_first=True),
        "GRU (as root)": lambda: nn.GRU(32, 24, batch_first=True),
        "MultiheadAttention (as root)": lambda: nn.MultiheadAttention(32, 4, batch_first=True),
    }
    for name, make in table.items():
        yield Specimen(name, "torch", "sequence", _build(make, name))


def _build(make: Callable[[], nn.Module], name: str) -> Callable[[], Built]:
    def build() -> Built:
        torch.manual_seed(0)
        module = make().eval()
        arguments = 1
        if name.endswith("(as root)"):
            arguments = {"Transformer": 2, "MultiheadAttention": 3}.get(name.split()[0], 1)

        def inputs(batch: int, length: int) -> Inputs:
            return Inputs(tuple(torch.randn(batch, length, 32) for _ in range(arguments)))

        return module, {"example": inputs(2, 7), "batch": inputs(3, 7), "size": inputs(2, 11)}

    return build
