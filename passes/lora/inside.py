"""Modules that use their weights as a whole, in kernels of their own: attention, recurrent and transformer layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import nn

from fxopt.modules import rebuild, replaced
from passes.lora.adapter import WeightAdapter

HOLDER = "lora"


class Adapted:
    """The mixin of `AdaptedLSTM` and its kin: runs the plain forward on weights that have their adapters in them.

    The parameters keep their names; the adapters are the children of a child `lora`.
    """

    stays_whole: ClassVar[bool] = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain forward."""
        assert isinstance(self, nn.Module)
        with replaced(list(_adapted_weights(self))):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class AdaptedMultiheadAttention(Adapted, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with adapters."""


class AdaptedLSTM(Adapted, nn.LSTM):
    """`torch.nn.LSTM` with adapters."""


class AdaptedGRU(Adapted, nn.GRU):
    """`torch.nn.GRU` with adapters."""


class AdaptedRNN(Adapted, nn.RNN):
    """`torch.nn.RNN` with adapters."""


class AdaptedEncoderLayer(Adapted, nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` with adapters, which its fast path sees too."""


class AdaptedDecoderLayer(Adapted, nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer` with adapters."""


class AdaptedEncoder(Adapted, nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder` with adapters."""


class AdaptedDecoder(Adapted, nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder` with adapters."""


class AdaptedTransformer(Adapted, nn.Transformer):
    """`torch.nn.Transformer` with adapters."""


_FORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: AdaptedMultiheadAttention,
    nn.LSTM: AdaptedLSTM,
    nn.GRU: AdaptedGRU,
    nn.RNN: AdaptedRNN,
    nn.TransformerEncoderLayer: AdaptedEncoderLayer,
    nn.TransformerDecoderLayer: AdaptedDecoderLayer,
    nn.TransformerEncoder: AdaptedEncoder,
    nn.TransformerDecoder: AdaptedDecoder,
    nn.Transformer: AdaptedTransformer,
}


def is_adaptable(module: nn.Module) -> bool:
    """Whether `module` is one of those here."""
    return type(module) in _FORMS or isinstance(module, Adapted)


def has_no_form(module: nn.Module) -> bool:
    """Whether `module` is one of those here in a form of its own, such as that with masks, which would be lost."""
    return isinstance(module, tuple(_FORMS)) and not is_adaptable(module)


def adapted(module: nn.Module) -> nn.Module:
    """The same module in the form that holds adapters."""
    made = rebuild(module, _FORMS[type(module)])
    made.add_module(HOLDER, nn.Module().train(module.training))
    return made


def plain(module: nn.Module) -> nn.Module:
    """The same module without its adapters."""
    kind = next(kind for kind, form in _FORMS.items() if type(module) is form)
    made = rebuild(module, kind)
    del made._modules[HOLDER]
    return made


def weights(module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """The weights of `module` that can be adapted: path, the module that owns it, and the parameter."""
    for path, owner in module.named_modules():
        if path.split(".")[0] == HOLDER and isinstance(module, Adapted):
            continue
        for leaf, parameter in owner._parameters.items():
            if parameter is not None and parameter.dim() == 2 and parameter.is_floating_point():
                yield (f"{path}.{leaf}" if path else leaf), owner, parameter


def _adapted_weights(module: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for adapter in module.get_submodule(HOLDER).children():
        assert isinstance(adapter, WeightAdapter)
        path, _, leaf = adapter.inner.rpartition(".")
        owner = module.get_submodule(path)
        weight: torch.Tensor = owner._parameters[leaf]  # type: ignore[assignment]
        found = adapter(weight)
        if found is not weight:
            yield owner, leaf, found
