"""What a ladder tries: engines by name, options and passes, in which order, and of which module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fxopt import bench
from fxopt.contract import Skip
from fxopt.engines.eager import Eager
from fxopt.engines.executable import Executable
from fxopt.engines.onnxruntime import OnnxRuntime
from fxopt.engines.sparse import Sparse
from fxopt.engines.table import ENGINES, written
from fxopt.graph import GraphModule
from fxopt.modules import Mask, is_quantized

AUTO, ALL = "auto", "all"


def placed_for(asked: str, place: torch.device) -> str:
    """The engine to place quantisers for: the one asked for, and where several will run them on a CPU, onnxruntime.

    Its integer kernels ask for most: OpenVINO runs the same as fast as what is placed for it, and onnxruntime what is
    placed for none at 0.3 to 0.9 of the speed (benchmarks/results/ice_lake/quantization.md).
    """
    return OnnxRuntime.name if asked in (AUTO, ALL) and place.type == "cpu" else asked


@dataclass(frozen=True)
class Rung:
    """One engine of a ladder.

    Attributes:
        engine: its name.
        options: that differ from the defaults.
        passes: the spec of what rewrites the module further before it is built; empty for nothing.
        executable: what it made; None where it dropped out.
        build_seconds: that it took, with these passes and without capture.
        relative_error: the largest over all inputs that were tried, against the original.
        resident_bytes: by which what the process holds there grew meanwhile, with libraries that nothing had loaded
            before; None where that is not known.
        comparison: of the original with it.
        dropped: why it is out of the running; empty where it is not.
        closer_than: the label of a rung that rounds more, and is preferred where its error is allowed.
        compiles: whether it compiles code, which may take minutes.
        in_floats: whether quantisers are left out: what integers are measured beside, and is never chosen.
        parity: of a quantised module, how its outputs agree with the simulation, and how large its file is.
    """

    engine: str
    options: Mapping[str, Any] = field(default_factory=dict)
    passes: str = ""
    executable: Executable | None = None
    build_seconds: float | None = None
    relative_error: float | None = None
    resident_bytes: int | None = None
    comparison: bench.Comparison | None = None
    dropped: str = ""
    closer_than: str = ""
    compiles: bool = False
    in_floats: bool = False
    parity: tuple[Skip, ...] = ()

    @property
    def reasons(self) -> tuple[Skip, ...]:
        """What the engine could not take, behind how well it computes on integers."""
        return (*self.parity, *self.executable.reasons) if self.executable is not None else ()

    @property
    def label(self) -> str:
        """`openvino{precision=bf16}`, `onednn after cast{dtype=bf16}`, `onnxruntime in floats`."""
        options = ",".join(f"{name}={value}" for name, value in self.options.items())
        return f"{self.engine}{{{options}}}{self.beforehand}" if options else f"{self.engine}{self.beforehand}"

    @property
    def beforehand(self) -> str:
        """The end of the label: what the module became before it was built."""
        return f"{' in floats' if self.in_floats else ''}{f' after {self.passes}' if self.passes else ''}"

    @property
    def is_rounded(self) -> bool:
        """Whether it computes in fewer bits than the module does."""
        return bool(self.passes) or not self.options.keys().isdisjoint(_ROUNDING)


_ROUNDING = ("precision", "tf32")
_CAST = "cast{dtype=bf16}"
_IN_BFLOAT16 = {
    "openvino": Rung("openvino", {"precision": "bf16"}, in_floats=True),
    "onnxruntime": Rung("onednn", passes=_CAST, in_floats=True),
    "inductor": Rung("inductor", passes=_CAST, in_floats=True),
}
"""What is measured beside integers of an engine; onnxruntime has no kernels of its own for bfloat16 on the CPU."""
ON_CPU: Sequence[Rung] = (
    Rung("eager"),
    Rung("openvino", {"precision": "bf16"}),
    Rung("openvino", {"precision": "mixed"}, closer_than="openvino{precision=bf16}"),
    Rung("openvino"),
    Rung("onnxruntime"),
    Rung("onednn"),
    Rung("onednn", passes=_CAST),
    Rung("sparse"),
    Rung("inductor", compiles=True),
)
ON_CUDA: Sequence[Rung] = (
    Rung("eager"),
    Rung("cudagraph", passes=_CAST),
    Rung("cudagraph", {"tf32": True}),
    Rung("cudagraph"),
    Rung("cudnn"),
    Rung("cublas"),
    Rung("cublas", {"precision": "fp8"}),
    Rung("sparse"),
    Rung("cudagraph", {"around": "inductor"}, compiles=True),
    Rung("inductor", compiles=True),
)
"""Both in the order in which they are built: what wins most often first, what builds slowly or seldom wins last, when
the budget may be spent."""
IN_FLOATS: Sequence[Rung] = (
    Rung("openvino", in_floats=True),
    _IN_BFLOAT16["openvino"],
    Rung("onednn", in_floats=True),
    _IN_BFLOAT16["onnxruntime"],
    Rung("onnxruntime", in_floats=True),
)
"""What integers are measured beside on the CPU where all engines are asked for."""


def candidates(asked: str, module: GraphModule, place: torch.device) -> Sequence[Rung]:
    """What to build, in this order: all that may be fastest, or what was asked for behind `eager`.

    Behind engines that run a quantised module on integers come those in floats that they are measured beside.

    Args:
        asked: an engine with options, "auto" or "all".
        module: that is to be built.
        place: where.

    Raises:
        EngineError, SpecError: see `written`.
    """
    if asked in (AUTO, ALL):
        known = ON_CUDA if place.type == "cuda" else [*ON_CPU, *(IN_FLOATS if is_quantized(module) else ())]
        return [rung for rung in known if rung.engine != Sparse.name or _has_zeros(module)]
    name, given = written(asked)
    rung = Rung(name, {option: value for option, value in given.items() if value != getattr(ENGINES[name], option)})
    if rung.engine == Eager.name:
        return [rung]
    beside = []
    if rung.engine in _IN_BFLOAT16 and is_quantized(module):
        exact = {name: value for name, value in rung.options.items() if name not in _ROUNDING}
        beside = [Rung(rung.engine, exact, in_floats=True), _IN_BFLOAT16[rung.engine]]
    return [Rung("eager"), rung, *beside]


def _has_zeros(module: GraphModule) -> bool:
    """Whether masks hold weights at zero, or most of a weight is zero."""
    if any(isinstance(child, Mask) for child in module.modules()):
        return True
    weights = (parameter for parameter in module.parameters() if parameter.dim() > 1)
    return any(2 * int(weight.count_nonzero()) < weight.numel() for weight in weights)
