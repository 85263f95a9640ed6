"""A captured module as an ONNX model, and the way of its inputs and outputs: for engines that read ONNX."""

from fxopt.engines.onnx.export import FREE_OPTION, Export, Free, export
from fxopt.engines.onnx.outputs import Outputs, nested, outputs_of
from fxopt.engines.onnx.quiet import quiet

__all__ = ["FREE_OPTION", "Export", "Free", "Outputs", "export", "nested", "outputs_of", "quiet"]
