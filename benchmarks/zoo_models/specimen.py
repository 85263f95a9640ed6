"""One model of the zoo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fxopt.inputs import Inputs

Built = tuple[nn.Module, Mapping[str, Inputs]]


@dataclass(frozen=True)
class Specimen:
    """A model and how it is called.

    Attributes:
        name: of the model in its library, with what sets this call apart in brackets.
        library: torch, torchvision, timm or transformers.
        kind: what it does: classification, decoder, ...
        build: makes the module, in evaluation mode, and its inputs by name: "example" is captured, the others
            ("batch", "size") differ in what they say.
    """

    name: str
    library: str
    kind: str
    build: Callable[[], Built]


class QuickInitialization(TorchFunctionMode):
    """Leaves out the inverse error function, by which large models spend most of their time being initialized.

    Truncated normal numbers become uniform ones: random weights all the same.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run everything else."""
        if func is torch.Tensor.erfinv_:
            return args[0]
        return func(*args, **(kwargs or {}))
