"""Layers of torch.nn that use their weights as a whole, with masks on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from fxopt.modules.mask import SUFFIX, Mask
from fxopt.modules.rebuild import rebuild
from fxopt.modules.replaced import replaced


class MaskedEmbedding(nn.Embedding):
    """`torch.nn.Embedding` with a mask on its weight, which is looked up as the weight is."""

    stays_whole: ClassVar[bool] = True

    weight_mask: Mask

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Rows of the masked weight."""
        held = self.weight_mask
        options = (self.padding_idx, None, self.norm_type, self.scale_grad_by_freq, self.sparse)
        if held.score is not None:
            return F.embedding(input, held(self.weight), *options)
        # The table may be large and the rows few.
        return torch.where(held.mask[input], F.embedding(input, self.weight, *options), 0)


class _Replacing:
    """Runs the plain forward with masked weights in the place of the weights."""

    stays_whole: ClassVar[bool] = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain forward."""
        assert isinstance(self, nn.Module)
        with replaced(list(_masked_weights(self))):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class MaskedLSTM(_Replacing, nn.LSTM):
    """`torch.nn.LSTM` with masks on its weights."""


class MaskedGRU(_Replacing, nn.GRU):
    """`torch.nn.GRU` with masks on its weights."""


class MaskedRNN(_Replacing, nn.RNN):
    """`torch.nn.RNN` with masks on its weights."""


class MaskedMultiheadAttention(_Replacing, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with masks on its weights, that of `out_proj` included."""


MASKED_FORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Embedding: MaskedEmbedding,
    nn.LSTM: MaskedLSTM,
    nn.GRU: MaskedGRU,
    nn.RNN: MaskedRNN,
    nn.MultiheadAttention: MaskedMultiheadAttention,
}
"""Which layers have a form that holds masks, beside convolutions and linear layers, whose form is `Fused`."""


def masked_form(module: nn.Module) -> nn.Module:
    """The same module, with the same parameters, in the form that holds masks."""
    return rebuild(module, MASKED_FORMS[type(module)])


def unmasked_form(module: nn.Module) -> nn.Module:
    """The same module without its masks."""
    plain = next(plain for plain, masked in MASKED_FORMS.items() if type(module) is masked)
    made = rebuild(module, plain)
    for name in [name for name, child in made._modules.items() if isinstance(child, Mask)]:
        del made._modules[name]
    return made


def _masked_weights(module: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for owner in module.modules():
        for name, child in owner._modules.items():
            if isinstance(child, Mask):
                leaf = name.removesuffix(SUFFIX)
                yield owner, leaf, child(owner._parameters[leaf])
