"""A model that OpenVINO has read, compiled for each shape of inputs that it meets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fxopt.engines.openvino.mixed import keep_in_float32
from fxopt.engines.openvino.session import Pieces, Session, Whole
from fxopt.engines.openvino.zero_points import drop_zero_points

Shapes = tuple[torch.Size, ...]


class Model:
    """Compiles a model where it meets new sizes, and runs it.

    Args:
        path: of a file in ONNX, with free sizes.
        precision: what it computes in: f32, bf16 or mixed.

    Attributes:
        read: as OpenVINO has read it.
        threads: that it runs on: as many as torch does.
        rows: of the pieces in which batches run that are multiples of it; 0 to run all at once.

    Raises:
        RuntimeError: what OpenVINO says, where it cannot read the file.
        EngineError: where it is too old for mixed precision.
    """

    def __init__(self, path: Path, precision: str):
        import openvino

        self.threads = torch.get_num_threads()
        self.rows = 0
        self._core = openvino.Core()
        self.read = self._core.read_model(path)
        drop_zero_points(self.read)
        if precision == "mixed":
            keep_in_float32(self._core, self.read)
        hint = "f32" if precision == "f32" else "bf16"
        self._settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": self.threads}
        self._sessions: dict[Shapes, Session] = {}

    def __call__(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Run.

        Raises:
            RuntimeError: what OpenVINO says.
        """
        return self.session(tuple([tensor.shape for tensor in tensors]))(tensors)

    def session(self, shapes: Shapes) -> Session:
        """What runs inputs of these shapes, compiled now where it is not yet."""
        found = self._sessions.get(shapes)
        if found is None:
            batch = next((shape[0] for shape in shapes if shape), 0)
            in_pieces = self.rows and batch % self.rows == 0 and batch // self.rows >= self.threads
            found = self._sessions[shapes] = self.pieces(shapes, self.rows) if in_pieces else self.whole(shapes)
        return found

    def settle(self, shapes: Shapes, rows: int, session: Session) -> None:
        """Run batches in pieces of `rows` rows from now on, inputs of these shapes by `session`."""
        self.rows = rows
        self._sessions = {shapes: session}

    def whole(self, shapes: Shapes) -> Whole:
        """For inputs of these shapes, run at once."""
        return Whole(self._compiled(shapes, {"PERFORMANCE_HINT": "LATENCY"}))

    def pieces(self, shapes: Shapes, rows: int) -> Pieces:
        """For inputs of these shapes, run in pieces of `rows` rows."""
        piece = tuple([torch.Size((rows, *shape[1:])) if shape else shape for shape in shapes])
        compiled = self._compiled(piece, {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": self.threads})
        return Pieces(compiled, rows, self.threads)

    def _compiled(self, shapes: Shapes, settings: dict[str, Any]) -> Any:
        sized = self.read.clone()
        sized.reshape(dict(enumerate(map(list, shapes))))
        return self._core.compile_model(sized, "CPU", self._settings | settings)
