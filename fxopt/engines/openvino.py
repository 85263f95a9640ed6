"""OpenVINO on the CPU."""

from __future__ import annotations

import importlib.util
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from fxopt.engines.contract import Built, Engine, Sizes
from fxopt.engines.integers import left_floats_by_openvino
from fxopt.engines.onnx import export, nested, output_structure, quiet
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.modules import FakeQuantize

_BFLOAT16_TOLERANCE = 5e-2


@dataclass(frozen=True)
class OpenVINO(Engine):
    """Exports the graph to ONNX and runs it by OpenVINO, compiled once for each batch size that it is called with.

    By itself OpenVINO computes in bfloat16 where the CPU has matrix units; here only if `precision` asks for it.
    """

    name: ClassVar[str] = "openvino"
    sizes: ClassVar[Sizes] = Sizes.BATCH
    integers: ClassVar[bool] = True

    precision: Literal["f32", "bf16"] = field(default="f32", metadata={"help": "what it computes in: f32 or bf16"})

    def __post_init__(self) -> None:
        if self.precision not in ("f32", "bf16"):
            raise EngineError(f"engine 'openvino': precision is 'f32' or 'bf16', not {self.precision!r}")

    def unavailable(self) -> str | None:
        """It is a package of its own."""
        if importlib.util.find_spec("openvino") and importlib.util.find_spec("onnxscript"):
            return None
        return "OpenVINO is not installed; `pip install fxopt[openvino]` brings it"

    def tolerance(self, dtype: torch.dtype) -> float:
        """That of bfloat16 where it computes in it."""
        return max(super().tolerance(dtype), _BFLOAT16_TOLERANCE if self.precision == "bf16" else 0.0)

    def build(self, module: GraphModule, inputs: Inputs, choices: Mapping[str, Any]) -> Built:
        """See `Engine.build`."""
        import openvino

        structure = output_structure(self.name, module, inputs)
        program, reasons = export(self.name, module, inputs)
        core = openvino.Core()
        with tempfile.TemporaryDirectory(prefix="fxopt-") as directory, quiet():
            path = Path(directory) / "model.onnx"
            program.save(path)
            try:
                model = core.read_model(path)
            except RuntimeError as error:
                raise EngineError(f"engine 'openvino' cannot read the exported model: {error}") from error
        del program
        settings = {
            "INFERENCE_PRECISION_HINT": self.precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        sessions: dict[tuple[torch.Size, ...], _Session] = {}

        def call(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            shapes = tuple([tensor.shape for tensor in tensors])
            try:
                if shapes not in sessions:
                    sized = model.clone()
                    sized.reshape(dict(enumerate(map(list, shapes))))
                    sessions[shapes] = _Session(core.compile_model(sized, "CPU", settings))
                return sessions[shapes](tensors)
            except RuntimeError as error:
                raise EngineError(f"engine 'openvino' fails: {error}") from error

        def write(directory: Path) -> None:
            openvino.save_model(model, directory / "model.xml", compress_to_fp16=False)

        run = nested(structure, call)
        run(*inputs.args, **inputs.kwargs)
        if any(isinstance(child, FakeQuantize) for child in module.modules()):
            reasons += left_floats_by_openvino(next(iter(sessions.values())).compiled)
        return Built(run, reasons, write=write, recorded=False)


class _Session:
    """Runs a compiled model for one shape of inputs.

    By a request of its own: to call a compiled model looks into its arguments first, which takes as long as a layer.

    Attributes:
        compiled: the model.
    """

    def __init__(self, compiled: Any):
        import openvino

        self.compiled = compiled
        self._request = compiled.create_infer_request()
        self._outputs = range(len(compiled.outputs))
        self._tensor = openvino.Tensor
        self._lock = threading.Lock()

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        request = self._request
        with self._lock:
            for index, tensor in enumerate(tensors):
                request.set_input_tensor(index, self._tensor(tensor.numpy(), shared_memory=True))
            request.infer(share_outputs=True)
            # Copied by NumPy, since torch's threads would spin where those of OpenVINO run next.
            return [torch.from_numpy(request.get_output_tensor(index).data.copy()) for index in self._outputs]
