"""The models of `quantization.py`, with random weights, each with one input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fxopt.torchvision_operators import declare_missing

BERT = "bert-base, 128 tokens"


def torchvision_model(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A model of torchvision and one image."""
    declare_missing()
    import torchvision

    return torchvision.models.get_model(name, weights=None), torch.randn(1, 3, 224, 224)


def vit_tiny() -> tuple[nn.Module, torch.Tensor]:
    """timm's smallest vision transformer and one image."""
    declare_missing()
    import timm

    return timm.create_model("vit_tiny_patch16_224"), torch.randn(1, 3, 224, 224)


class Layer(nn.Module):
    """A transformer layer whose projections are layers of their own, as most models write them."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.before, self.behind = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens of (batch, tokens, width) to the same."""
        batch, tokens, width = x.shape
        qkv = self.qkv(self.before(x)).reshape(batch, tokens, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        fed: torch.Tensor = x + self.down(nn.functional.gelu(self.up(self.behind(x))))
        return fed


def encoder() -> tuple[nn.Module, torch.Tensor]:
    """Six layers of 384, and 128 embedded tokens."""
    return nn.Sequential(*(Layer(384, 6) for _ in range(6))), torch.randn(1, 128, 384)


def bert_base() -> tuple[nn.Module, torch.Tensor]:
    """BERT's base configuration, and 128 tokens."""
    declare_missing()
    import transformers

    config = transformers.BertConfig()
    return transformers.BertModel(config), torch.randint(0, config.vocab_size, (1, 128))


MODELS: dict[str, Callable[[], tuple[nn.Module, torch.Tensor]]] = {
    "resnet18": lambda: torchvision_model("resnet18"),
    "resnet50": lambda: torchvision_model("resnet50"),
    "mobilenet_v2": lambda: torchvision_model("mobilenet_v2"),
    "mobilenet_v3_large": lambda: torchvision_model("mobilenet_v3_large"),
    "vit_tiny": vit_tiny,
    "encoder, 6 layers of 384, 128 tokens": encoder,
    BERT: bert_base,
}
