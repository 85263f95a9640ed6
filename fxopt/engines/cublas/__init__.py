"""cuBLASLt's products of eight bits on CUDA: integers of a quantised module, or float8 of any module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch

from fxopt.capture.independent import same_tensors_copy
from fxopt.contract import Skip
from fxopt.engines.binding import bind
from fxopt.engines.contract import Built, Engine
from fxopt.engines.cublas import float8, int8
from fxopt.engines.cublas.candidate import Candidate
from fxopt.engines.gpu import why_no_gpu
from fxopt.engines.integers import counted
from fxopt.engines.layers import Layers
from fxopt.engines.shortest import shortest
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.rewriting import propagate_shapes

_CAPABILITY = {"int8": (7, 5), "fp8": (8, 9)}
_FLOAT8_TOLERANCE = 0.2
_LAYER_SECONDS = 0.2
_WORTH = 0.97
"""Share of torch's own time below which eight bits are taken: what is nearer is noise."""


@dataclass(frozen=True)
class Cublas(Engine):
    """Linear layers in eight bits, where that is measured to be faster; everything else as torch runs it.

    `int8` takes a module that `qat` or `ptq` has quantised and computes what that simulates. `fp8` takes any module and
    rounds weights and inputs itself, so its outputs differ: 3 bits of a number are kept.
    """

    name: ClassVar[str] = "cublas"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    integers: ClassVar[bool] = True

    precision: Literal["int8", "fp8"] = field(default="int8", metadata={"help": "of the products: int8 or fp8"})
    measure: bool = field(default=True, metadata={"help": "leave a layer as it is where eight bits are no faster"})

    def __post_init__(self) -> None:
        if self.precision not in _CAPABILITY:
            raise EngineError(f"engine 'cublas': precision is 'int8' or 'fp8', not {self.precision!r}")

    def unavailable(self) -> str | None:
        """It needs a GPU with units for such products."""
        reason, needed = why_no_gpu(), _CAPABILITY[self.precision]
        if reason is not None:
            return reason
        there = torch.cuda.get_device_capability()
        if there >= needed:
            return None
        return (
            f"products in {self.precision} need a GPU of compute capability {needed[0]}.{needed[1]}, and this one has "
            f"{there[0]}.{there[1]}"
        )

    def tolerance(self, dtype: torch.dtype) -> float:
        """That of float8 where products are in it."""
        return max(super().tolerance(dtype), _FLOAT8_TOLERANCE if self.precision == "fp8" else 0.0)

    def build(self, module: GraphModule, inputs: Inputs, choices: Mapping[str, Any]) -> Built:
        """See `Engine.build`; shapes are written into the metadata of the module's nodes."""
        propagate_shapes(module, inputs)
        with torch.random.fork_rng(devices=[]):
            root, found = self._found(module)
        reasons, chosen = list[Skip](), dict[str, str]()
        for each in found:
            if isinstance(each, Skip):
                reasons.append(each)
                continue
            why = choices[each.key] if each.key in choices else self._why_not(each)
            chosen[each.key] = why
            if why:
                reasons.append(each.skip(why))
            else:
                each.put()
        count = sum(not why for why in chosen.values())
        integers = counted(+Counter(linear=count))
        first = integers if self.precision == "int8" else Skip("", f"linear layers in float8: {count}")
        return Built(bind(root), (first, *reasons), chosen, holds=(root,))

    def _found(self, module: GraphModule) -> tuple[GraphModule, list[Candidate | Skip]]:
        """A copy of the module over the same tensors, and its layers."""
        if self.precision == "fp8":
            layers = Layers(module, float8.supported)
            return layers.root, list(float8.candidates(layers))
        root = cast(GraphModule, same_tensors_copy(module))
        return root, list(int8.candidates(root))

    def _why_not(self, candidate: Candidate) -> str:
        """Why a layer stays as it is; empty where eight bits are faster."""
        calls = {"torch": lambda: candidate.plain(*candidate.given), "8": lambda: candidate.kernel(*candidate.given)}
        with torch.no_grad():
            try:
                calls["8"]()
            except RuntimeError as error:  # sizes or a GPU that cuBLASLt has no kernel for
                return f"cuBLASLt refuses it: {str(error).strip().splitlines()[0]}"
            if not self.measure:
                return ""
            seconds = shortest(calls, _LAYER_SECONDS)
        if seconds["8"] <= _WORTH * seconds["torch"]:
            return ""
        return f"measured, {self.precision} took {seconds['8'] / seconds['torch']:.2f}x as long as floats"
