"""The text of a pipeline, both ways: `fuse,qat{bits=8},lora{targets=[q,v]}` <-> passes with their options."""

from fxopt.spec.describe import Option, PassDescription, describe
from fxopt.spec.pipeline import find, parse, read_options, render

__all__ = ["Option", "PassDescription", "describe", "find", "parse", "read_options", "render"]
