"""torch.compile's default backend: loops and fusions generated and compiled for this machine."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch

from fxopt.capture.independent import same_tensors_copy
from fxopt.engines.contract import Built, Engine
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs


@dataclass(frozen=True)
class Inductor(Engine):
    """Compiles the graph by TorchInductor; weights become constants where `freezing` says so.

    The first call with other sizes compiles once more.
    """

    name: ClassVar[str] = "inductor"

    freezing: bool = field(default=True, metadata={"help": "treat weights as constants: fold and pack them"})
    max_autotune: bool = field(default=False, metadata={"help": "try more kernels, for a longer build"})

    def unavailable(self) -> str | None:
        """It needs a C++ compiler."""
        from torch._inductor import config

        names = [name for name in (*_listed(config.cpp.cxx), "g++", "clang++", "cl") if name]
        if any(shutil.which(name) for name in names):
            return None
        return "torch.compile needs a C++ compiler; `apt-get install g++` brings one"

    def build(self, module: GraphModule, inputs: Inputs, choices: Mapping[str, Any]) -> Built:
        """See `Engine.build`; the first call compiles, and is made here."""
        copy = cast(GraphModule, same_tensors_copy(module))
        options: dict[str, Any] = {"freezing": self.freezing, "max_autotune": self.max_autotune}
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what the compiler says of its own deprecated parts
                compiled = torch.compile(copy, options=options)
                given = inputs.map(lambda tensor: tensor.detach().clone())
                compiled(*given.args, **given.kwargs)
        except Exception as error:  # whatever a compiler raises
            raise EngineError(
                f"engine 'inductor' cannot compile the module: {type(error).__name__}: {_first_line(error)}"
            ) from error
        return Built(compiled)


def _listed(names: Any) -> list[str]:
    return [names] if isinstance(names, str) else [name for name in names or () if isinstance(name, str)]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
