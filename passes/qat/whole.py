"""Modules of torch.nn that are called as one, in the forms that quantise what they multiply inside."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from fxopt.contract import Change, Skip
from fxopt.graph import why_not_plain
from fxopt.modules import (
    MASKED_FORMS,
    Fused,
    QuantizedEmbedding,
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedMultiheadAttention,
    QuantizedRNN,
    QuantizedRNNCell,
    rebuild,
)
from fxopt.modules.quantized import SUFFIX
from passes.qat.scheme import Scheme

_FORMS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Embedding: QuantizedEmbedding,
    nn.LSTM: QuantizedLSTM,
    nn.GRU: QuantizedGRU,
    nn.RNN: QuantizedRNN,
    nn.LSTMCell: QuantizedLSTMCell,
    nn.GRUCell: QuantizedGRUCell,
    nn.RNNCell: QuantizedRNNCell,
    nn.MultiheadAttention: QuantizedMultiheadAttention,
}
_CONTAINERS = (
    nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder, nn.TransformerDecoder, nn.Transformer
)  # fmt: skip
_QUANTIZED = tuple(_FORMS.values())


def is_whole(module: nn.Module) -> bool:
    """Whether there is a form for it, or for layers in it."""
    return isinstance(module, (*_FORMS, *_CONTAINERS))


def quantized_form(
    module: nn.Module, name: str, scheme: Scheme, named: Callable[[str], bool], inputs: tuple[str, ...], source: str
) -> tuple[nn.Module, list[Change | Skip]]:
    """The form of `module` that quantises, or `module` itself where nothing is to be quantised.

    Args:
        module: one of which `is_whole` holds.
        name: its qualified name.
        scheme: with what.
        named: whether a qualified name is among those asked for.
        inputs: for attention, which of `query`, `key` and `value` are tensors of their own.
        source: the user's line.
    """
    if isinstance(module, _CONTAINERS):
        return _container(module, name, scheme, named, source)
    held = isinstance(module, Fused) and module.weight_fake_quant is not None
    if isinstance(module, _QUANTIZED) or held or not named(name):
        return module, []
    is_masked = type(module) in MASKED_FORMS.values()
    plain = type(module) if is_masked else next(kind for kind in (*_FORMS, nn.Linear) if isinstance(module, kind))
    reason = why_not_plain(module, plain) or _why_not(module)
    if reason is not None:
        return module, [Skip(name, reason, source)]
    made, has_input = _single(module, scheme, inputs)
    made.train(module.training)
    return made, [Change(scheme.what(True, has_input and scheme.activation_bits is not None), name, source)]


def _container(
    module: nn.Module, name: str, scheme: Scheme, named: Callable[[str], bool], source: str
) -> tuple[nn.Module, list[Change | Skip]]:
    """Its layers quantised, and without the fast path, which would not see it."""
    made, found = rebuild(module, type(module)), []
    for leaf, child in _layers(module):
        inputs = ("query",) if leaf == "self_attn" else ("query", "key")
        owner, _, last = leaf.rpartition(".")
        form, said = quantized_form(child, f"{name}.{leaf}", scheme, named, inputs, source)
        holder = made.get_submodule(owner)
        if form is not child and holder is module.get_submodule(owner):  # a list of layers
            holder = rebuild(holder, type(holder))
            made._modules[owner] = holder
        holder._modules[last] = form
        found += said
    if not any(isinstance(each, Change) for each in found):
        return module, found
    if isinstance(module, nn.TransformerEncoderLayer):
        made.__dict__["activation_relu_or_gelu"] = 0
    if isinstance(module, nn.TransformerEncoder):
        made.__dict__["use_nested_tensor"] = False
    return made, found


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{leaf}", each) for leaf, each in child.named_children())
        elif is_whole(child) or isinstance(child, nn.Linear):
            yield name, child


def _why_not(module: nn.Module) -> str | None:
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "its 'max_norm' rewrites the weight at each call"
        if module.sparse:
            return "its gradient is sparse, and that of a rounded weight is not"
    if isinstance(module, nn.MultiheadAttention) and (module.bias_k is not None or module.add_zero_attn):
        return "its 'bias_k', 'bias_v' or 'add_zero_attn' add to keys and values what no quantiser has seen"
    if isinstance(module, nn.MultiheadAttention) and (reason := why_not_plain(module.out_proj, nn.Linear)) is not None:
        return f"'out_proj': {reason}"
    weights = [weight for weight in module.parameters(recurse=False) if weight.dim() == 2]
    return None if weights and all(map(torch.is_floating_point, weights)) else "it has no floating-point weight"


def _single(module: nn.Module, scheme: Scheme, inputs: tuple[str, ...]) -> tuple[nn.Module, bool]:
    """The form of one layer, and whether it quantises its input."""
    values = scheme.activation_bits is not None
    if isinstance(module, nn.Linear):
        return Fused.of(
            module,
            weight_fake_quant=scheme.for_weight(0, module.weight.detach()),
            input_fake_quant=scheme.for_value(module.weight) if values else None,
        ), True
    form = rebuild(module, next(form for plain, form in _FORMS.items() if isinstance(module, plain)))
    for leaf, weight in module.named_parameters(recurse=False):
        if weight.dim() == 2:
            form._modules[f"{leaf}{SUFFIX}"] = scheme.for_weight(0, weight.detach())
    if not isinstance(module, nn.MultiheadAttention):
        return form, False
    form._modules["out_proj"] = _single(module.out_proj, scheme, ())[0]
    if values:
        form._modules |= {f"{each}{SUFFIX}": scheme.for_value(module.out_proj.weight) for each in inputs}
    return form, True
