"""One side of a comparison: a module and its inputs, apart from the user's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxopt.bench.cuda import graph_of
from fxopt.capture.blame import advice_on
from fxopt.capture.independent import apart_in_memory, independent_copy
from fxopt.errors import EngineError
from fxopt.inputs import Inputs

T = TypeVar("T")
_LARGEST_CACHE_BYTES = 1 << 30
"""What is larger is read from memory whoever read it before."""


class Arm:
    """A copy of a module, on the device, with its own copy of the inputs.

    Each arm has memory of its own, so none finds its weights in the cache because another just used them, and
    what a forward writes, running statistics for one, never reaches the user's module. Weights that no cache holds are
    shared with the user's module until they are written.

    Args:
        name: what errors call it.
        module: a module, or anything to be called, which is not copied.
        inputs: copied to the device.
        device: where it runs.
        timed: whether it matters which memory is read.
    """

    def __init__(
        self, name: str, module: Callable[..., Any], inputs: Inputs, device: torch.device, *, timed: bool = True
    ):
        self.name = name
        self.kind = type(module).__name__
        self.copied = True
        self._device = device
        self.module = self._copy(module, timed)
        self._inputs = self._own(inputs)
        self._described = inputs.describe()
        self._replay: Callable[[], object] | None = None
        self._pristine: Inputs | None = None
        self._with_gradients = False
        self._versions = [tensor._version for tensor in self._inputs.tensors]

    def _copy(self, module: Callable[..., Any], timed: bool) -> Callable[..., Any]:
        if not isinstance(module, nn.Module):
            self.copied = False
            return module
        try:
            copied = apart_in_memory if timed and _fits_a_cache(module) else independent_copy
            return copied(module).to(self._device)
        except Exception as error:
            tensors = [*module.parameters(), *module.buffers()]
            if any(tensor.device != self._device for tensor in tensors):
                raise EngineError(
                    f"cannot copy {self.name!r} ({self.kind}) to {str(self._device)!r} to measure it there: {error}; "
                    f"move it there first"
                ) from error
            self.copied = False
            return module

    def _own(self, inputs: Inputs) -> Inputs:
        return inputs.map(lambda tensor: tensor.detach().to(self._device, copy=True))

    def call(self) -> Any:
        """One forward, or the replay of one."""
        if self._replay is not None:
            return self._replay()
        if self._with_gradients:
            with torch.enable_grad():
                return self.module(*self._inputs.args, **self._inputs.kwargs)
        return self.module(*self._inputs.args, **self._inputs.kwargs)

    def replay_graph(self) -> None:
        """From now on `call` replays a forward that is captured here as a CUDA graph.

        Raises:
            EngineError: where none can be captured.
        """
        if self._inputs.objects:
            raise EngineError(
                f"{self.name!r} ({self.kind}): a CUDA graph replays kernels alone, and not what a call does to an "
                f"object that it is given; the inputs are {self._described}"
            )
        try:
            self._replay = graph_of(self.call, self._device)
        except EngineError as error:
            raise EngineError(f"{self.name!r} ({self.kind}): {error}") from error

    def under(self, measure: Callable[[Callable[[], object]], T]) -> T:
        """Let `measure` make the calls, with gradients for a module in training mode whose forward asks for them.

        Raises:
            EngineError: where the module raises.
        """
        self.refresh()
        try:
            return measure(self.call)
        except Exception as error:
            if advice_on(error) and getattr(self.module, "training", False) and not self._with_gradients:
                self._with_gradients = True
                return self.under(measure)
            raise EngineError(
                f"{self.name!r} ({self.kind}) raised {type(error).__name__} while measured on {str(self._device)!r} "
                f"with inputs {self._described}: {error}{advice_on(error)}"
            ) from error

    def watched(self, measure: Callable[[Callable[[], object]], T]) -> T | None:
        """Let `measure` watch the operators of a call; None where that does not work for this module."""
        try:
            return self.under(measure)
        except EngineError:
            return None

    @property
    def writes_inputs(self) -> bool:
        """Whether a call so far wrote into the inputs, or may have changed an object among them."""
        return bool(self._inputs.objects) or [tensor._version for tensor in self._inputs.tensors] != self._versions

    def keep_inputs(self, inputs: Inputs) -> None:
        """From now on `refresh` puts these values into the inputs again."""
        self._pristine = self._own(inputs)
        self.refresh()

    def refresh(self) -> None:
        """Undo what calls wrote into the inputs, where `keep_inputs` asked for it."""
        if self._pristine is None:
            return
        if self._inputs.objects:
            self._inputs = self._own(self._pristine)
            return
        for tensor, pristine in zip(self._inputs.tensors, self._pristine.tensors, strict=True):
            tensor.copy_(pristine)


def _fits_a_cache(module: nn.Module) -> bool:
    tensors = [tensor for tensor in (*module.parameters(), *module.buffers()) if not is_lazy(tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.layout is torch.strided) <= _LARGEST_CACHE_BYTES
