"""Modules that passes put into a graph and that other passes and the engines recognise again."""

from fxopt.modules.activation import Activation
from fxopt.modules.fake_quantize import FakeQuantize, Observer, State
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
from fxopt.modules.onnx_quantize import for_onnx
from fxopt.modules.rebuild import rebuild

__all__ = [
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
    "Observer",
    "State",
    "for_onnx",
    "fused_call",
    "rebuild",
]
