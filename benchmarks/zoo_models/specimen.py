"""One model of the zoo."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

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
