"""A model that OpenVINO has read, compiled for each shape of inputs that it meets, or once for all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fxopt.engines.openvino.session import Pieces, Session, Whole
from fxopt.engines.openvino.zero_points import drop_zero_points

Shapes = tuple[torch.Size, ...]


def shapes_of(tensors: Sequence[torch.Tensor]) -> Shapes:
    """The shapes of all tensors."""
    return tuple([tensor.shape for tensor in tensors])


class Model:
    """Compiles a model where it meets new sizes, and runs it.

    Args:
        path: of a file in ONNX, with free sizes.
        each: whether to compile for each shape, and not once for all.

    Attributes:
        core: of OpenVINO.
        read: as OpenVINO has read it.
        precision: what it computes in: "f32" or "bf16".
        threads: that it runs on: as many as torch does.
        rows: of the pieces in which batches run that are multiples of it; 0 to run all at once.

    Raises:
        RuntimeError: what OpenVINO says, where it cannot read the file.
    """

    def __init__(self, path: Path, *, each: bool = True):
        import openvino

        self._each = each
        self.threads = torch.get_num_threads()
        self.rows = 0
        self.core = openvino.Core()
        self.read = self.core.read_model(path)
        self.precision = "f32"
        drop_zero_points(self.read)
        self._sessions: dict[Shapes, Session] = {}

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run.

        Raises:
            RuntimeError: what OpenVINO says.
        """
        return self.session(shapes_of(tensors))(tensors)

    def session(self, shapes: Shapes) -> Session:
        """What runs inputs of these shapes, compiled now where it is not yet."""
        shapes = shapes if self._each else ()
        found = self._sessions.get(shapes)
        if found is None:
            batch = next((shape[0] for shape in shapes if shape), 0)
            in_pieces = self.rows and batch % self.rows == 0 and batch // self.rows >= self.threads
            found = self._sessions[shapes] = self.pieces(shapes, self.rows) if in_pieces else self.whole(shapes)
        return found

    def replace(self, read: Any, precision: str) -> None:
        """Run another form of the model from now on."""
        self.read, self.precision = read, precision
        self._sessions = {}

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
        if shapes:
            sized.reshape(dict(enumerate(map(list, shapes))))
        settings |= {"INFERENCE_PRECISION_HINT": self.precision, "INFERENCE_NUM_THREADS": self.threads}
        return self.core.compile_model(sized, "CPU", settings)
