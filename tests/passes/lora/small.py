"""Small models, one for each kind of layer that an adapter can go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.lin0 = nn.Linear(10, 20, bias=bias)
        self.drop = nn.Dropout(0.5)
        self.lin1 = nn.Linear(20, 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.lin1(self.drop(torch.relu(self.lin0(x)))), dim=-1)


class Conv1D(nn.Module):
    """A linear layer whose weight is (in, out), under the name that GPT-2's has."""

    def __init__(self, outputs: int, inputs: int):
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 3)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        flat = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return flat.view(*x.size()[:-1], self.nf)


class EmbConv1D(nn.Module):
    def __init__(self, conv: type[nn.Module] = Conv1D):
        super().__init__()
        self.emb = nn.Embedding(100, 5)
        self.conv1d = conv(1, 5)
        self.lin0 = nn.Linear(10, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.conv1d(self.emb(ids)))
        return self.lin0(x.flatten(1))


class ConvNet(nn.Module):
    """A convolution under the name `conv1d`, `conv2d` or `conv3d`, and a linear layer behind it."""

    def __init__(self, dims: int, *sizes: Any, hidden: int, **options: Any):
        super().__init__()
        self.name = f"conv{dims}d"
        self.add_module(self.name, getattr(nn, f"Conv{dims}d")(*sizes, **options))
        self.lin0 = nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(torch.relu(getattr(self, self.name)(x)).flatten(1))


class MHA(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(10, 2)
        self.lin0 = nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.mha(x, x, x)
        return F.log_softmax(self.lin0(out), dim=-1)


class OnParameter(nn.Module):
    """Linear in effect, but no nn.Linear."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / 3)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Gated(nn.Module):
    """Several parameters of one module, not in the order of their use."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(8, 16) / 4)
        self.gate = nn.Parameter(torch.randn(16, 8) / 4)
        self.up = nn.Parameter(torch.randn(16, 8) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)


class Mixture(nn.Module):
    """The matrices of three experts in each of two parameters, with outputs or with inputs first."""

    def __init__(self, is_transposed: bool):
        super().__init__()
        self.is_transposed = is_transposed
        sizes = ((3, 8, 6), (3, 6, 8)) if is_transposed else ((3, 6, 8), (3, 8, 6))
        self.up, self.down = (nn.Parameter(torch.randn(size) / 3) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        up, down = (each if self.is_transposed else each.transpose(1, 2) for each in (self.up, self.down))
        return torch.bmm(torch.tanh(torch.bmm(x.expand(3, -1, -1), up)), down).sum(0)


class MLPOnParameters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin0 = OnParameter(10, 20)
        self.lin1 = OnParameter(20, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.lin1(torch.relu(self.lin0(x))), dim=-1)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(ids))))


class TiedByFunction(nn.Module):
    """The head is a function of the table of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.body = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.body(self.embed(ids))), self.embed.weight)


class AlsoAWhole(nn.Module):
    """The weight of a layer is read once more, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.enc(x)), self.enc.weight.t())


class TwoNames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


class Functional(nn.Module):
    """Parameters of the root, each used by a function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.randn(8, 6))
        self.product = nn.Parameter(torch.randn(8, 8))
        self.mixed = nn.Parameter(torch.randn(8, 8))
        self.kernel = nn.Parameter(torch.randn(4, 2, 3))
        self.table = nn.Parameter(torch.randn(10, 6))

    def forward(self, ids: Tensor) -> Tensor:
        x = F.linear(F.embedding(ids, self.table), self.linear) @ self.product
        x = torch.einsum("bsi,oi->bso", x, self.mixed)
        return F.conv1d(x.transpose(1, 2)[:, :4], self.kernel, padding=2, dilation=2, groups=2)


class FusedQKV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v))


class Recurrents(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(10, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.lstm(x)[0])[0]


class Gate(nn.Module):
    """Opaque: its Python code decides on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(8, 8)
        self.right = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum().item() > 0:
            return self.left(x)
        return self.right(x) * 2


class Opaque(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(x))


def ints(*shape: int, high: int = 20) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, high, shape)


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)
