"""Whether a batch runs faster in pieces, and whether it may be taken apart at all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch

from fxopt.engines.openvino.model import Model, shapes_of
from fxopt.engines.openvino.session import Pieces, Session, plain
from fxopt.engines.shortest import shortest
from fxopt.inputs import Inputs
from fxopt.relative_error import relative_error

Tensors = Sequence[torch.Tensor]

_SIZES = (1, 2)
"""Larger pieces gain little, and each size is compiled anew to try it."""
_LONG_SECONDS = 0.5
"""A batch that takes longer is tried in pieces of the first size alone: what a piece costs beside its rows is little
then, and each size takes six calls or more to try."""
_SECONDS = 1.0
_WORTH = 0.95
"""Share of the time of the whole batch below which pieces are worth it: best times of a few calls differ as much."""


def choose_rows(model: Model, inputs: Inputs, tolerance: float) -> None:
    """Settle in which pieces the batch of the example runs fastest, or that it runs at once.

    Pieces are for models that compute each row by itself. That is seen by running it: the rows of a piece must stay
    the same, bit for bit, while all others change, and pieces must give what the whole batch gives.

    Args:
        model: with a free batch size.
        inputs: the example.
        tolerance: relative error by which pieces may differ, since other kernels compute them.

    Raises:
        RuntimeError: what OpenVINO says, where it cannot run the whole batch.
    """
    batch = inputs.batch_size or 0
    sizes = [rows for rows in _SIZES if batch % rows == 0 and batch // rows >= model.threads > 1]
    if not sizes:
        return
    tensors, others = plain(inputs), plain(inputs.fresh(1))
    shapes = shapes_of(tensors)
    whole = model.session(shapes)
    sessions: dict[str, Session] = {"0": whole}
    began = time.perf_counter()
    expected = whole(tensors)
    for rows in sizes[:1] if time.perf_counter() - began > _LONG_SECONDS else sizes:
        try:
            if _are_independent(whole, tensors, others, expected, rows):
                pieces = model.pieces(shapes, rows)
                if _are_alike(pieces, tensors, expected, rows, tolerance):
                    sessions[str(rows)] = pieces
        except RuntimeError:  # what OpenVINO cannot compile for these sizes, or run with these values
            continue
    if len(sessions) == 1:
        model.settle(shapes, 0, whole)
        return
    times = shortest({name: partial(session, tensors) for name, session in sessions.items()}, _SECONDS)
    best = min(times, key=times.__getitem__)
    best = best if times[best] < _WORTH * times["0"] else "0"
    model.settle(shapes, int(best), sessions[best])


def _are_independent(whole: Session, given: Tensors, others: Tensors, expected: Tensors, rows: int) -> bool:
    """Whether the first and the last rows of all outputs are as expected whatever the other rows are."""
    batch = next(tensor.shape[0] for tensor in given if tensor.dim())
    if any(output.dim() == 0 or output.shape[0] != batch for output in expected):
        return False
    for kept in (slice(None, rows), slice(-rows, None)):
        mixed = [own.clone() if own.dim() == 0 else other.clone() for own, other in zip(given, others, strict=True)]
        for tensor, own in zip(mixed, given, strict=True):
            if tensor.dim():
                tensor[kept] = own[kept]
        if not all(
            torch.equal(output[kept], other[kept]) for output, other in zip(expected, whole(mixed), strict=True)
        ):
            return False
    return True


def _are_alike(pieces: Pieces, given: Tensors, expected: Tensors, rows: int, tolerance: float) -> bool:
    """Whether pieces give what the whole batch gives."""
    if any(port.shape[0] != rows for port in pieces.compiled.outputs):
        return False
    pairs = list(zip(expected, pieces(given), strict=True))
    return all(one.shape == other.shape and relative_error(one, other) <= tolerance for one, other in pairs)
