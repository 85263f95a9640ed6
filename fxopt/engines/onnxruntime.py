"""ONNX Runtime on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from fxopt.contract import Skip
from fxopt.engines.contract import Built, Engine, Sizes
from fxopt.engines.exports import exported
from fxopt.engines.integers import left_floats
from fxopt.engines.onnx import FREE_OPTION, Free, export, nested, outputs_of
from fxopt.engines.onnx.parted import part_weights
from fxopt.engines.saturation import AVOIDED, SATURATES, saturates
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.modules import is_quantized


@dataclass(frozen=True)
class OnnxRuntime(Engine):
    """Exports the graph to ONNX, with a free batch size, and runs it by ONNX Runtime with torch's number of threads.

    The first call with other sizes, as of a longer sequence, exports once more, with all sizes free. At each new shape
    the module is run beside that.

    Its threads spin from one operator to the next, and stop where a call ends: as fast as those that spin on, which
    would disturb whatever else the process computes. Negative indices count from the end, also where torch raises.
    """

    name: ClassVar[str] = "onnxruntime"
    sizes: ClassVar[Sizes] = Sizes.BATCH
    integers: ClassVar[bool] = True

    free: Free = field(default="batch", metadata=FREE_OPTION)

    def freed(self) -> Engine | None:
        """With all sizes free."""
        return None if self.free == "all" else dataclasses.replace(self, free="all")

    def unavailable(self) -> str | None:
        """It is a package of its own."""
        if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript"):
            return None
        return "ONNX Runtime is not installed; `pip install onnxruntime onnxscript` brings it"

    def build(self, module: GraphModule, inputs: Inputs, choices: Mapping[str, Any]) -> Built:
        """See `Engine.build`."""
        outputs = outputs_of(self.name, module, inputs)
        quantised = is_quantized(module)
        with (
            exported(self.name, module, inputs, outputs, self.free) as file,
            tempfile.TemporaryDirectory(prefix="fxopt-") as directory,
        ):
            reasons, optimized = file.reasons, Path(directory) / "optimized.onnx"
            try:
                session, told, parted = _opened(file.path, optimized if quantised else None, saturates(module))
                reasons += (*left_floats(optimized), *told) if quantised else ()
            except Exception as error:  # its exceptions have no base of their own
                raise EngineError(f"engine 'onnxruntime' cannot read the exported model: {error}") from error
        names, asked = [one.name for one in session.get_inputs()], [one.name for one in session.get_outputs()]

        def call(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            try:
                found = session.run(asked, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)})
            except Exception as error:
                raise EngineError(f"engine 'onnxruntime' fails: {error}") from error
            # What is no dimension long comes as a number.
            return [torch.from_numpy(np.asarray(value)) for value in found]

        def write(directory: Path) -> None:
            program = export(module, inputs, outputs, self.free).program
            if parted:
                part_weights(program.model)
            program.save(directory / "model.onnx")

        return Built(nested(outputs, call), reasons, write=write, recorded=False, sizes=file.sizes, asks=file.asks)


def _opened(path: Path, optimized: Path | None, overflows: bool) -> tuple[Any, tuple[Skip, ...], bool]:
    """See `_session`; what is to be told of products that the CPU may saturate; and whether weights were parted."""
    if not overflows:
        return _session(path, optimized), (), False
    with contextlib.suppress(Exception):
        return _session(path, optimized, unsigned=True), (AVOIDED,), False
    # A weight that two operators read cannot be made unsigned: there it fails.
    with contextlib.suppress(Exception), tempfile.TemporaryDirectory(prefix="fxopt-") as directory:
        import onnx_ir as ir

        parted, model = Path(directory) / "parted.onnx", ir.load(path)
        part_weights(model)
        ir.save(model, parted, external_data=f"{parted.name}.data")
        return _session(parted, optimized, unsigned=True), (AVOIDED,), True
    return _session(path, optimized), (SATURATES,), False


def _session(path: Path, optimized: Path | None, unsigned: bool = False) -> Any:
    """A session of the model at `path`, in torch's number of threads.

    Args:
        optimized: where the model that it runs is written, for one on integers.
        unsigned: hold weights as unsigned bytes, whose products the CPU adds exactly.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 4  # what fails is raised as well
    if unsigned:
        options.add_session_config_entry("session.x64quantprecision", "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(
        path,
        options,
        providers=["CPUExecutionProvider"],
        # With a MatMul and its Add made one, the integer kernel for the MatMul no longer fits.
        disabled_optimizers=["MatMulAddFusion"] if optimized is not None else None,
    )
