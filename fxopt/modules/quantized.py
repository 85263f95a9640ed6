"""Layers of torch.nn that use their weights as a whole, with fake quantisers on these and on what is multiplied.

Masks on the weights come before the quantisers, which keep zeros as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import nn

from fxopt.modules.fake_quantize import FakeQuantize
from fxopt.modules.mask import held_weight
from fxopt.modules.replaced import replaced

SUFFIX = "_fake_quant"
"""What follows the name of a parameter in the name of its quantiser: both are children of one module."""


def quantized_weights(module: nn.Module) -> Iterator[tuple[str, nn.Module, str, FakeQuantize]]:
    """All weights in `module` that have a quantiser: path of the owner, the owner, name of the weight, quantiser."""
    for path, owner in module.named_modules():
        for name, child in owner._modules.items():
            leaf = name.removesuffix(SUFFIX)
            if isinstance(child, FakeQuantize) and owner._parameters.get(leaf) is not None:
                yield path, owner, leaf, child


class QuantizedEmbedding(nn.Embedding):
    """`torch.nn.Embedding` that looks up rows of a quantised weight."""

    stays_whole: ClassVar[bool] = True

    weight_fake_quant: FakeQuantize

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows of Q(W)."""
        weight = self.weight_fake_quant(held_weight(self, "weight"))
        return F.embedding(input, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


class _Replacing:
    """Runs the plain forward with quantised weights in the place of the weights."""

    stays_whole: ClassVar[bool] = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain forward."""
        assert isinstance(self, nn.Module)
        quantizers = [(name.removesuffix(SUFFIX), child) for name, child in self.named_children() if SUFFIX in name]
        with replaced([(self, leaf, quantizer(held_weight(self, leaf))) for leaf, quantizer in quantizers]):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class QuantizedLSTM(_Replacing, nn.LSTM):
    """`torch.nn.LSTM` with quantised weights."""


class QuantizedGRU(_Replacing, nn.GRU):
    """`torch.nn.GRU` with quantised weights."""


class QuantizedRNN(_Replacing, nn.RNN):
    """`torch.nn.RNN` with quantised weights."""


class QuantizedLSTMCell(_Replacing, nn.LSTMCell):
    """`torch.nn.LSTMCell` with quantised weights."""


class QuantizedGRUCell(_Replacing, nn.GRUCell):
    """`torch.nn.GRUCell` with quantised weights."""


class QuantizedRNNCell(_Replacing, nn.RNNCell):
    """`torch.nn.RNNCell` with quantised weights."""


class QuantizedMultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with quantised weights and inputs of its projections.

        softmax( Q(Wq) Q(x) (Q(Wk) Q(y))^T / sqrt(d) + mask ) Q(Wv) Q(z)   and then   out_proj, a `FusedLinear`

    Parameters keep their names; quantisers of weights follow them (`in_proj_weight_fake_quant`), those of inputs are
    `query_fake_quant`, `key_fake_quant` and `value_fake_quant`, each optional. Where query, key and value are one
    tensor, it is quantised once, as the query. It takes no `bias_k`, `bias_v` and `add_zero_attn`.
    """

    stays_whole: ClassVar[bool] = True

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `torch.nn.MultiheadAttention` takes and gives."""
        if is_causal and attn_mask is None:
            raise ValueError("is_causal only hints at what 'attn_mask' is: give the mask too")
        batched = query.dim() == 3
        q, k, v = (self._batch_first(each, batched) for each in self._projected(query, key, value))
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        q, k, v = (each.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for each in (q, k, v))
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * math.sqrt(1 / self.head_dim)) @ k.transpose(-2, -1)
            weights = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), dropout)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        return self._batch_first(out, batched) if batched else out.squeeze(0), weights

    def _batch_first(self, x: torch.Tensor, batched: bool) -> torch.Tensor:
        """(batch, length, width) of what the caller's layout is, or the caller's layout of that."""
        if not batched:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _projected(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x = self._quantized("query", query)
        y = x if key is query else self._quantized("key", key)
        z = x if value is query else y if value is key else self._quantized("value", value)
        bias = self.in_proj_bias
        if self.in_proj_weight is not None:
            weight = self._quantized("in_proj_weight", held_weight(self, "in_proj_weight"))
            if x is y is z:
                return F.linear(x, weight, bias).chunk(3, -1)
            weights = weight.chunk(3)
        else:
            names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
            weights = tuple(self._quantized(name, held_weight(self, name)) for name in names)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        return tuple(F.linear(*each) for each in zip((x, y, z), weights, biases, strict=True))

    def _quantized(self, name: str, value: torch.Tensor) -> torch.Tensor:
        fake = self._modules.get(f"{name}{SUFFIX}")
        return cast(torch.Tensor, value if fake is None else fake(value))

    def _mask(
        self, attn_mask: torch.Tensor | None, padding: torch.Tensor | None, like: torch.Tensor
    ) -> torch.Tensor | None:
        """What is added to the scores: (batch or 1, heads or 1, queries or 1, keys)."""
        if attn_mask is not None:
            attn_mask = _added(attn_mask, like)
            by_head = attn_mask.dim() == 3
            attn_mask = attn_mask.unflatten(0, (-1, self.num_heads)) if by_head else attn_mask[None, None]
        if padding is None:
            return attn_mask
        padding = _added(padding, like)[:, None, None]
        return padding if attn_mask is None else attn_mask + padding


def _added(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A mask of what must not be seen as what is added to scores."""
    if mask.dtype is not torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
