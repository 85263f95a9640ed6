"""Writes that engines would lose: those of a forward into what its caller holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from fxopt.capture.copy_on_write import version_of
from fxopt.errors import EngineError


@contextmanager
def refuse_writes(engine: str, module: nn.Module, inputs: Sequence[torch.Tensor]) -> Iterator[None]:
    """Make sure that what runs within writes into no parameter or buffer of a module, and into none of the inputs.

    Raises:
        EngineError: where it does.
    """
    named = [(f"'{name}'", tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())]
    named += [(f"input {number}", tensor) for number, tensor in enumerate(inputs)]
    versions = [version_of(tensor) for _, tensor in named]
    yield
    for (name, tensor), version in zip(named, versions, strict=True):
        if version_of(tensor) != version:
            raise EngineError(
                f"engine '{engine}' would lose what the module writes into {name}: return the new values in place of "
                "writing them, or take an engine that runs torch's graph, such as 'eager'"
            )
