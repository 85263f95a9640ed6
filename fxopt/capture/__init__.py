"""nn.Module -> Captured: run once, record, and say what was not recorded."""

from fxopt.capture.capture import capture
from fxopt.capture.captured import Captured, Constant, Coverage, Guard, Opaque

__all__ = ["Captured", "Constant", "Coverage", "Guard", "Opaque", "capture"]
