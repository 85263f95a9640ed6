"""The graph as torch itself runs it: what other engines are held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from fxopt.engines.contract import Built, Engine
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs


@dataclass(frozen=True)
class Eager(Engine):
    """Runs the graph operator by operator, on whatever device it is."""

    name: ClassVar[str] = "eager"
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    def build(self, module: GraphModule, inputs: Inputs, choices: Mapping[str, Any]) -> Built:
        """The module itself."""
        return Built(module)
