"""OpenVINO on the CPU."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from fxopt.contract import Skip
from fxopt.engines.contract import Built, Engine, Sizes
from fxopt.engines.exports import exported
from fxopt.engines.integers import left_floats_by_openvino
from fxopt.engines.onnx import FREE_OPTION, Free, nested, outputs_of, quiet
from fxopt.engines.openvino.complaint import complaint
from fxopt.engines.openvino.model import Model, shapes_of
from fxopt.engines.openvino.precision import compute_in_bfloat16, keep_enough_layers, keep_layers
from fxopt.engines.openvino.rows import choose_rows
from fxopt.engines.saturation import SATURATES, saturates
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.modules import is_quantized

_BFLOAT16_TOLERANCE = 5e-2


@dataclass(frozen=True)
class OpenVINO(Engine):
    """Exports the graph to ONNX and runs it by OpenVINO, compiled once for each batch size that it is called with.

    The first call with other sizes, as of a longer sequence, exports once more, with all sizes free. At each new shape
    the module is run beside that.

    Where rows are computed by themselves, a batch runs in pieces side by side, one on each thread, if that is measured
    to be faster. By itself OpenVINO computes in bfloat16 where the CPU has matrix units; here only if `precision` asks
    for it, with weights rounded so that no mean moves on the example. "mixed" keeps sums, normalisations and resizes in
    float32, and as many of the first layers as `max_error` asks for. Indices that lie outside of what they index, for
    which torch raises, give zeros or other values.
    """

    name: ClassVar[str] = "openvino"
    sizes: ClassVar[Sizes] = Sizes.BATCH
    integers: ClassVar[bool] = True

    precision: Literal["f32", "bf16", "mixed"] = field(
        default="f32", metadata={"help": "what it computes in: f32, bf16, or mixed: products in bf16, sums in f32"}
    )
    max_error: float | None = field(
        default=None, metadata={"help": "with precision=mixed, the relative error that outputs may have"}
    )
    pieces: bool = field(default=True, metadata={"help": "run a batch in pieces side by side, where that is faster"})
    free: Free = field(default="batch", metadata=FREE_OPTION)

    def __post_init__(self) -> None:
        if self.precision not in ("f32", "bf16", "mixed"):
            raise EngineError(f"engine 'openvino': precision is 'f32', 'bf16' or 'mixed', not {self.precision!r}")
        if self.max_error is not None and (self.precision != "mixed" or not self.max_error > 0):
            raise EngineError("engine 'openvino': max_error is a positive number, and for precision=mixed alone")

    def freed(self) -> Engine | None:
        """With all sizes free."""
        return None if self.free == "all" else dataclasses.replace(self, free="all")

    def unavailable(self) -> str | None:
        """It is a package of its own."""
        if importlib.util.find_spec("openvino") and importlib.util.find_spec("onnxscript"):
            return None
        return "OpenVINO is not installed; `pip install fxopt[openvino]` brings it"

    def in_vain(self, module: GraphModule) -> str | None:
        """bfloat16, where OpenVINO computes in float32 whatever it is told."""
        if self.precision == "f32" or _has_bfloat16():
            return None
        return "OpenVINO has no kernels for bfloat16 on this CPU, and computes in float32 instead"

    def tolerance(self, dtype: torch.dtype) -> float:
        """That of bfloat16 where it computes in it, unless it is told which."""
        rounding = (self.max_error or _BFLOAT16_TOLERANCE) if self.precision != "f32" else 0.0
        return max(super().tolerance(dtype), rounding)

    def within(self, max_error: float) -> Engine:
        """With this bound for mixed precision, where it has none of its own."""
        takes = self.precision == "mixed" and self.max_error is None
        return dataclasses.replace(self, max_error=max_error) if takes else self

    def build(self, module: GraphModule, inputs: Inputs, choices: Mapping[str, Any]) -> Built:
        """See `Engine.build`."""
        import openvino

        outputs = outputs_of(self.name, module, inputs)
        with exported(self.name, module, inputs, outputs, self.free) as file, quiet():
            try:
                model = Model(file.path, each=file.sizes is not Sizes.FREE)
            except RuntimeError as error:
                raise EngineError(f"engine 'openvino' cannot read the exported model: {complaint(error)}") from error
        reasons = file.reasons

        def call(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            try:
                return model(tensors)
            except RuntimeError as error:
                raise EngineError(f"engine 'openvino' fails: {complaint(error)}") from error

        def write(directory: Path) -> None:
            openvino.save_model(model.read, directory / "model.xml", compress_to_fp16=False)

        try:
            decided = self._settle_precision(model, inputs, choices)
            if self.pieces and file.sizes is Sizes.BATCH:
                if choices:
                    model.rows = choices["rows"]
                else:
                    choose_rows(model, inputs, self.tolerance(torch.float32))
        except RuntimeError as error:
            raise EngineError(f"engine 'openvino' fails: {complaint(error)}") from error
        run = nested(outputs, call)
        run(*inputs.args, **inputs.kwargs)
        if is_quantized(module):
            reasons += left_floats_by_openvino(model.session(shapes_of(inputs.tensors)).compiled)
        missing = self.in_vain(module)
        if missing is not None:
            reasons += (Skip("", missing),)
        if saturates(module):
            reasons += (SATURATES,)
        return Built(
            run,
            reasons,
            {**decided, "rows": model.rows},
            write=write,
            recorded=False,
            sizes=file.sizes,
            asks=file.asks,
        )

    def _settle_precision(self, model: Model, inputs: Inputs, choices: Mapping[str, Any]) -> dict[str, Any]:
        """Let a model compute in the precision that is asked for; returns what was decided, as `choices` have it."""
        if self.precision == "f32":
            return {}
        if self.precision == "bf16":
            compute_in_bfloat16(model, inputs)
            return {}
        if self.max_error is not None and not choices:
            return {"float32": keep_enough_layers(model, inputs, self.max_error)}
        share: float = choices.get("float32", 0.0)
        keep_layers(model, inputs, share)
        return {"float32": share}


def _has_bfloat16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
