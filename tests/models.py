"""The models that fxopt must handle, small: `STATIC` and `DYNAMIC`, each a `Case` by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Case:
    """A model and what it takes. `factory` is seeded by `build`; `inputs` makes fresh positional arguments."""

    factory: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def build(self, seed: int = 0) -> nn.Module:
        """The model in evaluation mode, with batch norms that have seen data."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.factory()
            settle(model)
        return model.eval()

    def example(self, seed: int = 1) -> tuple[Any, ...]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.inputs()


def settle(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and weights that a wrong fold would show."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None and module.running_var is not None:
                module.running_mean.copy_(torch.randn_like(module.running_mean) * 0.5)
                module.running_var.copy_(torch.rand_like(module.running_var) + 0.5)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.5)
    return model


def normal(*shape: int) -> Callable[[], tuple[torch.Tensor]]:
    return lambda: (torch.randn(*shape),)


def ids(*shape: int, high: int = 20) -> Callable[[], tuple[torch.Tensor]]:
    return lambda: (torch.randint(0, high, shape),)


# Multilayer perceptrons


class ResidualMLP(nn.Module):
    """LayerNorm, dropout, a residual, Xavier init in `__init__`."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 32)
        self.down = nn.Linear(32, width)
        self.dropout = nn.Dropout(0.1)
        for layer in (self.up, self.down):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class SimpleNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(16, 32)
        self.fc2 = nn.Linear(32, 16)
        self.fc3 = nn.Linear(16, 4)
        self.relu = nn.ReLU()
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        x = self.dropout(self.relu(self.fc1(x)))
        x = self.dropout(self.relu(self.fc2(x)))
        return self.fc3(x)


class HandLinear(nn.Module):
    """`x @ W.T + b`."""

    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(torch.randn(8, 16) * 0.2)
        self.b = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return x @ self.W.T + self.b


class ScaledLinear(nn.Module):
    """`torch.mm(x, W.t())` with a learnable scale gamma."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16) * 0.2)
        self.gamma = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        return torch.mm(x, self.weight.t()) * self.gamma


class NormalizedLinear(nn.Module):
    """`scale * F.normalize(W, dim=1)` into `F.linear`."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16))
        self.scale = nn.Parameter(torch.rand(8, 1) + 0.5)
        self.bias = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return F.linear(x, self.scale * F.normalize(self.weight, dim=1), self.bias)


class GLU(nn.Module):
    def __init__(self, inputs: int = 16, outputs: int = 16):
        super().__init__()
        self.proj = nn.Linear(inputs, 2 * outputs)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * torch.sigmoid(gate)


class DeepGLU(nn.Module):
    def __init__(self, depth: int = 4):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(depth))
        self.blocks = nn.ModuleList(GLU() for _ in range(depth))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x)


class NormOnRows(nn.Module):
    """BatchNorm1d on (N, C), behind and before a Linear."""

    def __init__(self):
        super().__init__()
        self.bn0 = nn.BatchNorm1d(16)
        self.fc1 = nn.Linear(16, 32, bias=False)
        self.bn1 = nn.BatchNorm1d(32)
        self.fc2 = nn.Linear(32, 4)

    def forward(self, x):
        return self.fc2(torch.relu(self.bn1(self.fc1(self.bn0(x)))))


# Convolutions


class ConvBlock(nn.Module):
    """conv, BN, ReLU in place, `padding='same'`."""

    def __init__(self, inputs: int, outputs: int, **options: Any):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=options.pop("padding", "same"), bias=False, **options)
        self.bn = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))


class FeatureExtractor(nn.Module):
    def __init__(self):
        super().__init__()
        self.block1 = ConvBlock(3, 8)
        self.block2 = ConvBlock(8, 12)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(12 * 2 * 2, 5)

    def forward(self, x):
        x = self.pool(self.block1(x))
        x = self.pool(self.block2(x))
        return self.fc(torch.flatten(x, 1))


class SqueezeExcitation(nn.Module):
    def __init__(self, channels: int, reduced: int = 4):
        super().__init__()
        self.fc1 = nn.Conv2d(channels, reduced, 1)
        self.fc2 = nn.Conv2d(reduced, channels, 1)

    def forward(self, x):
        scale = F.adaptive_avg_pool2d(x, 1)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(scale))))


class ResidualBlock(nn.Module):
    """The activation is ONE instance for all blocks: a default argument."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int = 1,
        groups: int = 1,
        dilation: int = 1,
        squeeze: bool = False,
        activation: nn.Module = nn.ReLU(inplace=True),  # noqa: B008
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, dilation, dilation, groups, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.activation = activation
        self.squeeze = SqueezeExcitation(outputs) if squeeze else None
        self.project = None
        if stride != 1 or inputs != outputs:
            self.project = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x if self.project is None else self.project(x)
        out = self.activation(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.squeeze is not None:
            out = self.squeeze(out)
        out += identity
        return self.activation(out)


class StagedCNN(nn.Module):
    """A ModuleList of Sequentials of conv blocks and residual blocks; adaptive pooling, a dropout head."""

    def __init__(self):
        super().__init__()
        self.stem = ConvBlock(3, 8)
        self.stages = nn.ModuleList(
            [
                nn.Sequential(ConvBlock(8, 8), ResidualBlock(8, 8)),
                nn.Sequential(
                    ResidualBlock(8, 16, stride=2, groups=2), ResidualBlock(16, 16, dilation=2, squeeze=True)
                ),
            ]
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(16, 5))

    def forward(self, x):
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(self.pool(x))


class ConvZoo(nn.Module):
    """Dilated, strided, depthwise; transposed and grouped; one- and three-dimensional."""

    def __init__(self):
        super().__init__()
        self.dilated = nn.Sequential(nn.Conv2d(4, 8, 3, padding=2, dilation=2), nn.BatchNorm2d(8), nn.Hardswish())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, groups=8), nn.BatchNorm2d(8), nn.SiLU())
        self.transposed = nn.Sequential(nn.ConvTranspose2d(8, 4, 2, 2, groups=2), nn.BatchNorm2d(4), nn.LeakyReLU(0.1))
        self.flat = nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), nn.Tanh())
        self.deep = nn.Sequential(nn.Conv3d(1, 2, 3), nn.BatchNorm3d(2), nn.GELU())

    def forward(self, x):
        x = self.transposed(self.depthwise(self.dilated(x)))
        row = self.flat(x.mean(2))
        return row, self.deep(x.unsqueeze(1))


class RepVGGBlock(nn.Module):
    def __init__(self, channels: int = 6):
        super().__init__()
        self.conv3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.identity = nn.BatchNorm2d(channels)

    def forward(self, x):
        return F.relu(self.bn3(self.conv3(x)) + self.bn1(self.conv1(x)) + self.identity(x))


class OneConvTwoNorms(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn1 = nn.BatchNorm2d(4)
        self.bn2 = nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.bn1(y), self.bn2(y)


class ConvTwice(nn.Module):
    """One conv called twice, once without its batch norm."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.conv(self.bn(self.conv(x)))


class PairTwice(ConvTwice):
    """The same conv+bn pair called twice."""

    def forward(self, x):
        return self.bn(self.conv(torch.relu(self.bn(self.conv(x)))))


# Built from data


class FromDicts(nn.Module):
    """Layers from a list of dicts, registered under two names."""

    LAYERS = (
        {"type": nn.Conv2d, "params": {"in_channels": 3, "out_channels": 6, "kernel_size": 3}, "name": "conv"},
        {"type": nn.BatchNorm2d, "params": {"num_features": 6}, "name": "norm", "condition": True},
        {"type": nn.Dropout, "params": {}, "name": "drop", "condition": False},
        {"type": nn.ReLU6, "params": {}, "name": "act"},
        {"type": nn.Flatten, "params": {}, "name": "flat"},
        {"type": nn.Linear, "params": {"in_features": 96, "out_features": 4}, "name": "head"},
    )

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList()
        for spec in self.LAYERS:
            if spec.get("condition", True):
                layer = spec["type"](**spec["params"])
                self.layers.append(layer)
                setattr(self, spec["name"], layer)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class Heads(nn.Module):
    """A head per task: one named task, or all of them as a dict."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(16, 8)
        self.heads = nn.ModuleDict({"mood": nn.Linear(8, 2), "topic": nn.Linear(8, 5)})

    def forward(self, x, task: str | None = None):
        x = torch.relu(self.trunk(x))
        if task is not None:
            return self.heads[task](x)
        return {name: head(x) for name, head in self.heads.items()}


class Holder(nn.Module):
    """A plain tensor, a Parameter, a named parameter, a buffer, a ParameterList and a ParameterDict."""

    def __init__(self):
        super().__init__()
        self.plain = torch.arange(4.0)
        self.weight = nn.Parameter(torch.randn(4))
        self.register_parameter("named", nn.Parameter(torch.randn(4)))
        self.register_buffer("offset", torch.ones(4))
        self.items = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(2)])
        self.table = nn.ParameterDict({"gain": nn.Parameter(torch.randn(4))})

    def forward(self, x):
        x = x * self.weight + self.named + self.offset + self.plain
        for item in self.items:
            x = x + item
        return x * self.table["gain"]


# Sequences


class Recurrent(nn.Module):
    """Embedding with padding_idx, a 2-layer LSTM with dropout, a bidirectional GRU."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8, padding_idx=0)
        self.lstm = nn.LSTM(8, 8, num_layers=2, dropout=0.1, batch_first=True)
        self.gru = nn.GRU(8, 4, bidirectional=True, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        x, _ = self.lstm(self.embed(tokens))
        x, _ = self.gru(x)
        return self.head(x[:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        y, _ = self.attend(x, x, x, need_weights=False)
        return self.head(x + y)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class TiedHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.body = nn.Linear(16, 16)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(torch.tanh(self.body(self.embed(tokens))))


# Dynamic: Python decides while it runs


class Router(nn.Module):
    """Mean-pool, gate, argmax, then a loop over the batch with `.item()` choosing one of three experts."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(16, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 16)) for _ in range(3))

    def forward(self, x):
        choice = self.gate(x.mean(1)).argmax(-1)
        return torch.stack([self.experts[choice[row].item()](x[row]) for row in range(x.shape[0])])


class Mixture(nn.Module):
    """Top-k mixture of experts with boolean masks and writes into slices of the output."""

    def __init__(self, k: int = 2):
        super().__init__()
        self.k = k
        self.gate = nn.Linear(16, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 16)) for _ in range(4))

    def forward(self, x):
        score, index = self.gate(x).topk(self.k, dim=-1)
        score = torch.softmax(score, dim=-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            chosen = index == number
            mask = chosen.any(-1)
            if not mask.any():
                continue
            share = (score * chosen).sum(-1)[mask].unsqueeze(-1)
            out[mask] = out[mask] + share * expert(x[mask])
        return out


class EarlyExit(nn.Module):
    """A difficulty head sets the depth, a confidence test returns early; (tensor, int, list of floats)."""

    def __init__(self, depth: int = 24):
        super().__init__()
        self.difficulty = nn.Linear(8, 1)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.exit = nn.Linear(8, 3)

    def forward(self, x):
        depth = max(1, int(torch.sigmoid(self.difficulty(x)).mean().item() * len(self.layers)))
        confidences: list[float] = []
        for layer in self.layers[:depth]:
            x = torch.relu(layer(x)) + x
            confidences.append(torch.softmax(self.exit(x), -1).max(-1).values.mean().item())
            if confidences[-1] > 0.95:
                break
        return self.exit(x), len(confidences), confidences


class LearnableDropout(nn.Module):
    """`torch.rand_like(x)` against `sigmoid(p)`, only in training."""

    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.tensor(0.0))
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        if self.training:
            x = x * (torch.rand_like(x) > torch.sigmoid(self.p))
        return self.fc(x)


# Losses


def focal_loss(logits, target, gamma: float = 2.0, alpha: float = 0.25):
    """Cross-entropy, exp, power (Lin et al. 2017)."""
    entropy = F.cross_entropy(logits, target, reduction="none")
    return (alpha * (1 - torch.exp(-entropy)) ** gamma * entropy).mean()


def weighted_loss(outputs, targets, weights):
    """A weighted sum of cross-entropies over lists of tasks."""
    return sum(w * F.cross_entropy(o, t) for o, t, w in zip(outputs, targets, weights, strict=True))


_IMAGE = normal(2, 3, 8, 8)
_ROWS = normal(4, 16)

STATIC: dict[str, Case] = {
    "residual_mlp": Case(ResidualMLP, _ROWS),
    "simple_net": Case(SimpleNet, _ROWS),
    "hand_linear": Case(HandLinear, _ROWS),
    "scaled_linear": Case(ScaledLinear, _ROWS),
    "normalized_linear": Case(NormalizedLinear, _ROWS),
    "glu": Case(GLU, _ROWS),
    "deep_glu": Case(DeepGLU, _ROWS),
    "norm_on_rows": Case(NormOnRows, _ROWS),
    "conv_block": Case(lambda: ConvBlock(3, 8), _IMAGE),
    "feature_extractor": Case(FeatureExtractor, _IMAGE),
    "residual_block": Case(lambda: ResidualBlock(3, 8, stride=2, squeeze=True), _IMAGE),
    "staged_cnn": Case(StagedCNN, _IMAGE),
    "conv_zoo": Case(ConvZoo, normal(2, 4, 11, 11)),
    "repvgg": Case(RepVGGBlock, normal(2, 6, 8, 8)),
    "one_conv_two_norms": Case(OneConvTwoNorms, _IMAGE),
    "conv_twice": Case(ConvTwice, normal(2, 4, 8, 8)),
    "pair_twice": Case(PairTwice, normal(2, 4, 8, 8)),
    "from_dicts": Case(FromDicts, normal(2, 3, 6, 6)),
    "heads": Case(Heads, _ROWS),
    "one_head": Case(Heads, _ROWS, {"task": "topic"}),
    "holder": Case(Holder, normal(3, 4)),
    "recurrent": Case(Recurrent, ids(3, 7)),
    "attention": Case(Attention, normal(2, 5, 16)),
    "encoder": Case(Encoder, normal(2, 5, 16)),
    "tied_head": Case(TiedHead, ids(3, 7)),
}

DYNAMIC: dict[str, Case] = {
    "router": Case(Router, normal(4, 3, 16)),
    "mixture": Case(Mixture, normal(6, 16)),
    "early_exit": Case(EarlyExit, normal(2, 8)),
    "learnable_dropout": Case(LearnableDropout, _ROWS),
}
