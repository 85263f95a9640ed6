"""Modules that passes put into a graph and that other passes and the engines recognise again."""

from fxopt.modules.activation import Activation
from fxopt.modules.fake_quantize import FakeQuantize, Observer, State, is_quantized, without_rounding
from fxopt.modules.functional import fused_call
from fxopt.modules.fused import (
    Fused,
    FusedConv1d,
    FusedConv2d,
    FusedConv3d,
    FusedConvTranspose1d,
    FusedConvTranspose2d,
    FusedConvTranspose3d,
    FusedLinear,
)
from fxopt.modules.inductor_quantize import for_inductor
from fxopt.modules.mask import Mask, held_weight
from fxopt.modules.masked import MASKED_FORMS, masked_form, unmasked_form
from fxopt.modules.onnx_quantize import for_onnx
from fxopt.modules.quantized import (
    QuantizedEmbedding,
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedMultiheadAttention,
    QuantizedRNN,
    QuantizedRNNCell,
    quantized_weights,
)
from fxopt.modules.rebuild import rebuild
from fxopt.modules.replaced import replaced
from fxopt.modules.settings import WithSettings

__all__ = [
    "MASKED_FORMS",
    "Activation",
    "FakeQuantize",
    "Fused",
    "FusedConv1d",
    "FusedConv2d",
    "FusedConv3d",
    "FusedConvTranspose1d",
    "FusedConvTranspose2d",
    "FusedConvTranspose3d",
    "FusedLinear",
    "Mask",
    "Observer",
    "QuantizedEmbedding",
    "QuantizedGRU",
    "QuantizedGRUCell",
    "QuantizedLSTM",
    "QuantizedLSTMCell",
    "QuantizedMultiheadAttention",
    "QuantizedRNN",
    "QuantizedRNNCell",
    "State",
    "WithSettings",
    "for_inductor",
    "for_onnx",
    "fused_call",
    "held_weight",
    "is_quantized",
    "masked_form",
    "quantized_weights",
    "rebuild",
    "replaced",
    "unmasked_form",
    "without_rounding",
]
