"""Writes that engines would lose: those of a forward into what its caller holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from fxopt.errors import EngineError


@contextmanager
def refuse_writes(engine: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Make sure that what runs within writes into none of these tensors, by what a message calls them.

    Raises:
        EngineError: where it does.
    """
    before = {name: tensor._version for name, tensor in tensors.items()}
    yield
    for name, tensor in tensors.items():
        if tensor._version != before[name]:
            raise EngineError(
                f"engine '{engine}' would lose what the module writes into {name}: return the new values in place of "
                "writing them, or take an engine that runs torch's graph, such as 'eager'"
            )
