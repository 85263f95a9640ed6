"""An activation as a value: which one, and with which arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

# In place where torch can: the only caller owns the tensor that it hands over.
_FUNCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "relu": torch.relu_,
    "relu6": lambda x: F.hardtanh_(x, 0.0, 6.0),
    "leaky_relu": F.leaky_relu_,
    "silu": lambda x: F.silu(x, inplace=True),
    "gelu": F.gelu,
    "hardsigmoid": lambda x: F.hardsigmoid(x, inplace=True),
    "hardswish": lambda x: F.hardswish(x, inplace=True),
    "sigmoid": torch.sigmoid_,
    "tanh": torch.tanh_,
    "hardtanh": F.hardtanh_,
}


@dataclass(frozen=True)
class Activation:
    """A pointwise function, `leaky_relu(negative_slope=0.1)`.

    Attributes:
        name: its name in `torch.nn.functional`.
        arguments: those beside the input, by name.
    """

    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def apply_(self, value: torch.Tensor) -> torch.Tensor:
        """The activation of `value`, whose memory it may reuse."""
        return _FUNCTIONS[self.name](value, **dict(self.arguments))

    def __str__(self) -> str:
        arguments = ", ".join(f"{key}={value!r}" for key, value in self.arguments)
        return f"{self.name}({arguments})" if arguments else self.name
