"""Calibration data, batch by batch: which of it a module does not take, and that running leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxopt.capture.state import random_state_kept, state_kept
from fxopt.errors import FxoptError, PassError
from fxopt.inputs import Inputs

ADVICE = "give an iterable of inputs, each a tensor, a tuple of positional arguments or a dict of keyword ones"


def several(who: str, data: Iterable[Any]) -> Iterable[Any]:
    """The data, where it is no single batch, of which each row or name would be taken for one.

    Raises:
        PassError: where it is.
    """
    if isinstance(data, (torch.Tensor, Mapping, Inputs)):
        raise PassError(f"{who}: the data is one {type(data).__name__}; {ADVICE}")
    return data


def run_batches(who: str, data: Iterable[Any], run: Callable[[Inputs], object]) -> int:
    """Hand each batch to `run`; how many there were.

    Args:
        who: wants the data, for messages.
        data: batches of inputs, each a tensor, a tuple of positional or a dict of keyword arguments.
        run: runs a module on a copy of one, since a model may write into its inputs.

    Raises:
        PassError: for data that is one batch itself, and a batch that holds NaN, or that the module does not take.
    """
    count = 0
    for count, batch in enumerate(several(who, data), start=1):
        inputs = Inputs.of(batch)
        for index, tensor in enumerate(inputs.tensors):
            if tensor.is_floating_point() and tensor.isnan().any():
                raise PassError(f"{who}: batch {count} holds NaN in its tensor {index}; leave it out")
        try:
            run(inputs.map(torch.clone))
        except (RuntimeError, TypeError, ValueError, IndexError, FxoptError) as error:
            what = str(error).partition("\n\nWhile executing")[0]  # torch.fx adds the node and how to trace it
            raise PassError(
                f"{who}: the module does not take batch {count} ({inputs.describe()}): {what}; {ADVICE}, without labels"
            ) from error
    return count


@contextmanager
def unaffected(module: nn.Module) -> Iterator[None]:
    """Let calls of `module` draw the same random numbers each time, and leave all that it holds as it was."""
    with state_kept(module), random_state_kept():
        torch.manual_seed(0)
        yield
