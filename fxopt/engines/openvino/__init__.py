"""OpenVINO on the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from fxopt.engines.contract import Built, Engine, Sizes
from fxopt.engines.exports import exported
from fxopt.engines.integers import left_floats_by_openvino
from fxopt.engines.onnx import nested, output_structure, quiet
from fxopt.engines.openvino.model import Model
from fxopt.engines.openvino.rows import choose_rows
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.modules import FakeQuantize

_BFLOAT16_TOLERANCE = 5e-2


@dataclass(frozen=True)
class OpenVINO(Engine):
    """Exports the graph to ONNX and runs it by OpenVINO, compiled once for each batch size that it is called with.

    Where rows are computed by themselves, a batch runs in pieces side by side, one on each thread, if that is measured
    to be faster. By itself OpenVINO computes in bfloat16 where the CPU has matrix units; here only if `precision` asks
    for it; "mixed" keeps sums and normalisations in float32.
    """

    name: ClassVar[str] = "openvino"
    sizes: ClassVar[Sizes] = Sizes.BATCH
    integers: ClassVar[bool] = True

    precision: Literal["f32", "bf16", "mixed"] = field(
        default="f32", metadata={"help": "what it computes in: f32, bf16, or mixed: products in bf16, sums in f32"}
    )
    pieces: bool = field(default=True, metadata={"help": "run a batch in pieces side by side, where that is faster"})

    def __post_init__(self) -> None:
        if self.precision not in ("f32", "bf16", "mixed"):
            raise EngineError(f"engine 'openvino': precision is 'f32', 'bf16' or 'mixed', not {self.precision!r}")

    def unavailable(self) -> str | None:
        """It is a package of its own."""
        if importlib.util.find_spec("openvino") and importlib.util.find_spec("onnxscript"):
            return None
        return "OpenVINO is not installed; `pip install fxopt[openvino]` brings it"

    def tolerance(self, dtype: torch.dtype) -> float:
        """That of bfloat16 where it computes in it."""
        return max(super().tolerance(dtype), _BFLOAT16_TOLERANCE if self.precision != "f32" else 0.0)

    def build(self, module: GraphModule, inputs: Inputs, choices: Mapping[str, Any]) -> Built:
        """See `Engine.build`."""
        import openvino

        structure = output_structure(self.name, module, inputs)
        with exported(self.name, module, inputs) as file, quiet():
            try:
                model = Model(file.path, self.precision)
            except RuntimeError as error:
                raise EngineError(f"engine 'openvino' cannot read the exported model: {error}") from error
        reasons = file.reasons

        def call(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            try:
                return model(tensors)
            except RuntimeError as error:
                raise EngineError(f"engine 'openvino' fails: {error}") from error

        def write(directory: Path) -> None:
            openvino.save_model(model.read, directory / "model.xml", compress_to_fp16=False)

        if choices:
            model.rows = choices["rows"]
        elif self.pieces and not reasons:  # the batch size is free
            try:
                choose_rows(model, inputs, self.tolerance(torch.float32))
            except RuntimeError as error:
                raise EngineError(f"engine 'openvino' fails: {error}") from error
        run = nested(structure, call)
        run(*inputs.args, **inputs.kwargs)
        if any(isinstance(child, FakeQuantize) for child in module.modules()):
            shapes = tuple([tensor.shape for tensor in inputs.tensors])
            reasons += left_floats_by_openvino(model.session(shapes).compiled)
        return Built(run, reasons, {"rows": model.rows}, write=write, recorded=False)
