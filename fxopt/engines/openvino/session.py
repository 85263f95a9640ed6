"""A model that OpenVINO has compiled, called with torch's tensors."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fxopt.inputs import Inputs

Arrays = Sequence[np.ndarray[Any, Any]]


def plain(inputs: Inputs) -> list[torch.Tensor]:
    """The tensors of inputs as a session takes them."""
    return [tensor.detach().contiguous() for tensor in inputs.tensors]


class Session(ABC):
    """Runs a compiled model.

    By requests of its own: to call a compiled model looks into its arguments first, which takes as long as a layer.
    Outputs are copied by NumPy, since torch's threads would spin where those of OpenVINO run next.

    Args:
        compiled: the model, of known sizes.
        requests: how many may run side by side.
    """

    def __init__(self, compiled: Any, requests: int):
        import openvino

        self.compiled = compiled
        self._requests = [compiled.create_infer_request() for _ in range(requests)]
        self._tensor = openvino.Tensor
        self._lock = threading.Lock()

    def __call__(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run.

        Raises:
            RuntimeError: what OpenVINO says.
        """
        arrays = [tensor.numpy() for tensor in tensors]
        with self._lock:
            return [torch.from_numpy(array) for array in self._run(arrays)]

    @abstractmethod
    def _run(self, arrays: Arrays) -> Arrays:
        """The outputs, which are nobody else's."""

    def _give(self, request: Any, arrays: Arrays) -> None:
        for index, array in enumerate(arrays):
            request.set_input_tensor(index, self._tensor(array, shared_memory=True))


class Whole(Session):
    """Runs all rows of a batch at once, on all threads."""

    def __init__(self, compiled: Any):
        super().__init__(compiled, 1)
        self._outputs = range(len(compiled.outputs))

    def _run(self, arrays: Arrays) -> Arrays:
        request = self._requests[0]
        self._give(request, arrays)
        request.infer(share_outputs=True)
        return [request.get_output_tensor(index).data.copy() for index in self._outputs]


class Pieces(Session):
    """Runs a batch in pieces of some rows, each on one thread, as many side by side as there are threads.

    Threads then do not wait for each other at the end of every operator, and a small piece stays in the caches.

    Args:
        compiled: the model for one piece, with a stream for each thread.
        rows: of a piece; it divides all batches.
        threads: of one stream each.
    """

    def __init__(self, compiled: Any, rows: int, threads: int):
        super().__init__(compiled, 2 * threads)
        self._rows = rows
        self._outputs = [(tuple(port.shape)[1:], port.element_type.to_dtype()) for port in compiled.outputs]

    def _run(self, arrays: Arrays) -> Arrays:
        batch = next(array.shape[0] for array in arrays if array.ndim)
        found = [np.empty((batch, *shape), dtype) for shape, dtype in self._outputs]
        pieces = [slice(start, start + self._rows) for start in range(0, batch, self._rows)]
        try:
            for number, piece in enumerate(pieces):
                request = self._requests[number % len(self._requests)]
                if number >= len(self._requests):
                    self._take(request, pieces[number - len(self._requests)], found)
                self._give(request, [array[piece] if array.ndim else array for array in arrays])
                request.start_async()
            for number in range(max(0, len(pieces) - len(self._requests)), len(pieces)):
                self._take(self._requests[number % len(self._requests)], pieces[number], found)
        except RuntimeError:
            for request in self._requests:
                with contextlib.suppress(RuntimeError):
                    request.wait()
            raise
        return found

    def _take(self, request: Any, piece: slice, found: Arrays) -> None:
        request.wait()
        for index, array in enumerate(found):
            array[piece] = request.get_output_tensor(index).data
