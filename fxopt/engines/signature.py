"""What an executable was built for, held against each call."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch

from fxopt.engines.contract import Sizes
from fxopt.errors import EngineError
from fxopt.inputs import Inputs
from fxopt.nested import flatten, is_same

Shapes = tuple[torch.Size, ...]


class OtherSizes(EngineError):
    """Inputs that differ from those of the example in sizes that are not free."""


class Signature:
    """Structure, dtypes, device and sizes of the inputs of an example.

    Args:
        engine: its name, for messages.
        inputs: the example.
        sizes: which sizes may differ.

    Attributes:
        sizes: the same.
        shapes: of the tensors among the inputs.
        devices: types of the devices that the inputs are on.
    """

    def __init__(self, engine: str, inputs: Inputs, sizes: Sizes):
        self._engine = engine
        self.sizes = sizes
        self._batch = inputs.batch_size
        self.shapes: Shapes = tuple([tensor.shape for tensor in inputs.tensors])
        self.devices = {tensor.device.type for tensor in inputs.tensors}
        leaves, self._structure = flatten((inputs.args, dict(inputs.kwargs)))
        # Where sizes may be any, the module's own guards stand in what is run.
        static = {id(tensor) for tensor in inputs.static_tensors} if sizes is not Sizes.ANY else set()
        self._leaves = [
            _Tensor(leaf, is_static=id(leaf) in static) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
        ]
        self._flat = (
            not inputs.kwargs and len(leaves) == len(inputs.args) and all(map(operator.is_, leaves, inputs.args))
        )

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Shapes | None:
        """Refuse a call that lies outside.

        Returns:
            The shapes of all tensors, where an exporter left free what may differ in them; None also where all sizes
            are those of the example.

        Raises:
            OtherSizes: naming the input, what was expected, and what to do.
            EngineError: likewise, where it is not by their sizes alone that inputs lie outside.
        """
        given: Any = args
        if not self._flat or kwargs or len(args) != len(self._leaves):
            given, structure = flatten((args, dict(kwargs)))
            if structure != self._structure:
                raise self._refused("the arguments are nested otherwise than those of the example")
        elif all(map(_is_alike, args, self._leaves)):
            return None  # the common case, without the cost of a closer look
        batch: int | None = None
        for index, (value, expected) in enumerate(zip(given, self._leaves, strict=True)):
            if not isinstance(expected, _Tensor):
                if not is_same(value, expected):
                    found = _Tensor(value) if isinstance(value, torch.Tensor) else repr(value)
                    raise self._refused(f"input {index} is {found}, it was built for {expected!r}")
            elif not isinstance(value, torch.Tensor):
                raise self._refused(f"input {index} is a {type(value).__name__}, it was built for {expected}")
            elif value.dtype is not expected.dtype or value.device != expected.device:
                raise self._refused(f"input {index} is {_Tensor(value)}, it was built for {expected}")
            elif expected.values is None:
                batch = self._check_shape(index, value, expected, batch)
            elif not torch.equal(value, expected.values):
                raise self._refused(f"input {index} is static, and holds other values than it was built for")
            if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
                raise EngineError(
                    f"engine '{self._engine}': input {index} requires a gradient, and this engine has none: call it "
                    "under torch.no_grad(), or use the module that it was lowered from"
                )
        if self.sizes not in (Sizes.FREE, Sizes.BATCH):
            return None
        return tuple([value.shape for value in given if isinstance(value, torch.Tensor)])

    def _check_shape(self, index: int, value: torch.Tensor, expected: _Tensor, batch: int | None) -> int | None:
        same = value.shape == expected.shape
        found = f"input {index} is {_Tensor(value)}, it was built for {expected}"
        if value.dim() != len(expected.shape):
            raise self._refused(found)
        if self.sizes in (Sizes.ANY, Sizes.FREE) or (same and (self._batch is None or not expected.shape)):
            return batch
        if not same and (self.sizes is Sizes.FIXED or self._batch is None):
            raise self._refused(f"{found}, and its sizes are fixed", OtherSizes)
        if value.shape[1:] != expected.shape[1:]:
            raise self._refused(f"{found}, of which only the batch size may differ", OtherSizes)
        if batch is not None and value.shape[0] != batch:
            raise self._refused(f"{found}, and the batch size of the inputs before it is {batch}", OtherSizes)
        return int(value.shape[0])

    def _refused(self, what: str, kind: type[EngineError] = EngineError) -> EngineError:
        return kind(f"engine '{self._engine}': {what}; lower the module again with such inputs")


def _is_alike(value: Any, expected: Any) -> bool:
    if not isinstance(expected, _Tensor):
        return value is expected
    return (
        type(value) is torch.Tensor
        and value.shape == expected.shape
        and value.dtype is expected.dtype
        and value.device == expected.device
        and not value.requires_grad
        and (expected.values is None or torch.equal(value, expected.values))
    )


class _Tensor:
    """What counts of a tensor; of a static one the values too."""

    def __init__(self, tensor: torch.Tensor, *, is_static: bool = False):
        self.values = tensor if is_static else None
        self.dtype = tensor.dtype
        self.device = tensor.device
        self.shape = tensor.shape

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape)) or "scalar"
        return f"{sizes} {str(self.dtype).removeprefix('torch.')} on {self.device}"
