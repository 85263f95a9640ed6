"""Which operators have an ONNX form, as the exporter of torch knows it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

# What a backend makes of an operator that has a form; export never sees these.
_INTERNAL = ("_", "mkldnn_", "cudnn_", "miopen_", "xnnpack_")


def lacks_onnx(operator: Any) -> bool:
    """Whether the export to ONNX fails at an operator: it has no form, and is not made of others that have."""
    name = operator.name().partition("::")[2]
    if torch.Tag.core in operator.tags or operator._can_decompose():
        return False
    if name.startswith(_INTERNAL) and not name.startswith("_linalg"):
        return False
    return not any(map(_has_form(), _functional(operator)))


def _functional(operator: Any) -> list[Any]:
    """What export makes of an operator that writes in place."""
    packet = getattr(torch.ops.aten, operator.overloadpacket.__name__.rstrip("_"), None)
    if not operator._schema.is_mutable or packet is None:
        return [operator]
    return [getattr(packet, overload) for overload in packet.overloads()]


@functools.cache
def _has_form() -> Callable[[Any], bool]:
    # Takes two seconds, and is asked of few operators.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from torch.onnx._internal.exporter import _decomp, _registration
        except ImportError:  # a torch that keeps it elsewhere: nothing can be said
            return lambda operator: True
        implemented = set(_decomp.get_onnx_implemented_overloads(_registration.ONNXRegistry.from_torchlib()))
        made_of_others = _decomp.create_onnx_friendly_decomposition_table(implemented)
    return lambda operator: operator in implemented or operator in made_of_others
