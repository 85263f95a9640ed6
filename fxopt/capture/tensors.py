"""What is known of each tensor while a module is recorded: its node, and what its values and shape depend on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeGuard, cast

import torch
import torch.fx as fx
from torch.fx.passes.shape_prop import TensorMetadata
from torch.utils.weak import WeakTensorKeyDictionary

from fxopt.capture import operators
from fxopt.capture.frames import user_source
from fxopt.capture.provenance import Depends
from fxopt.capture.tape import Tape
from fxopt.capture.traced import Traced
from fxopt.graph.effects import RANDOM


class Origin(NamedTuple):
    """What a result depends on.

    Attributes:
        values: what the values of its tensors depend on.
        shape: what their shapes do.
        numbers: what Python numbers in it do.
        given: whether it is an input, so that a guard can check what it holds besides tensors and numbers.
    """

    values: Depends
    shape: Depends
    numbers: Depends
    given: bool = False


@dataclass
class Value:
    """What is known of a tensor: the node that computes it, what its values and its shape depend on."""

    node: fx.Node
    depends: Depends
    shape: Depends


@dataclass(frozen=True)
class Met:
    """An unregistered tensor that the forward used, and who used it."""

    tensor: torch.Tensor
    name: str
    path: str
    location: str


class Tensors(Tape):
    """Tensors and their nodes.

    Args:
        tensors: qualified name of each parameter and buffer, by identity.

    Attributes:
        values: what is known of each tensor.
        met: unregistered tensors.
        fixed: names of those of them whose values were guarded when they were made, or can't depend on an input.
    """

    def __init__(self, tensors: Mapping[int, str]) -> None:
        super().__init__()
        self.tensors = tensors
        self.values = WeakTensorKeyDictionary()
        self.met: list[Met] = []
        self.fixed: set[Any] = set()
        self._written: dict[int, Depends] = {}

    def owns(self, value: Any) -> TypeGuard[Traced]:
        """Whether a value is a number that is traced by this recording, not by one before."""
        return isinstance(value, Traced) and cast("object", value.trace) is self

    def known(self, tensor: torch.Tensor) -> Value:
        """What is known of a tensor; a parameter, buffer or constant is met here for the first time."""
        value: Value | None = self.values.get(tensor)
        if value is None:
            name = self.tensors.get(id(tensor))
            if name is None:
                if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                    self.block("it runs under a transform of torch.func other than vmap")
                elif tensor.requires_grad and tensor.grad_fn is not None:
                    self.block("it uses a tensor that was computed before or outside of what torch lets be recorded")
                name = f"_constant_{len(self.met)}"
                self.met.append(Met(tensor, name, self.path, str(user_source() or "")))
            graph, self.graph = self.graph, self.whole
            value = Value(self.emit("get_attr", name), Depends.CONSTANT, Depends.CONSTANT)
            self.graph = graph
            if tensor.layout is torch.strided:
                value.node.meta["tensor_meta"] = metadata_of(tensor)
            self.values[tensor] = value
        return value

    def take_as_fixed(self, tensor: torch.Tensor) -> None:
        """Take a tensor for a constant: it was made of an array, and what reads a tensor into one is guarded."""
        self.fixed.add(self.known(tensor).node.target)

    def adopt_tensor(self, node: fx.Node, tensor: torch.Tensor, origin: Origin) -> torch.Tensor:
        """Let `node` stand for a tensor."""
        if self._written and tensor not in self.values and _has_memory(tensor):
            fresh = tensor._base is None and tensor.grad_fn is None and id(tensor) not in self.tensors
            if fresh:
                # The memory of a tensor that is gone.
                self._written.pop(tensor.untyped_storage()._cdata, None)
        self.values[tensor] = Value(node, origin.values, origin.shape)
        if tensor.layout is torch.strided and not tensor.is_quantized:
            node.meta["tensor_meta"] = metadata_of(tensor)
        if origin.shape is Depends.DATA:
            node.meta["sized_by_values"] = True
        return tensor

    def depends(self, tensor: torch.Tensor) -> Depends:
        """What the values of a tensor depend on, with what was written into its memory through others."""
        value = self.known(tensor)
        if not self._written or not _has_memory(tensor):
            return value.depends
        return max(value.depends, self._written.get(tensor.untyped_storage()._cdata, Depends.CONSTANT))

    def note_write(self, tensor: torch.Tensor, depends: Depends) -> None:
        """Note that values that depend on `depends` were written into a tensor."""
        value = self.known(tensor)
        value.depends = max(value.depends, depends)
        if _has_memory(tensor):
            key = tensor.untyped_storage()._cdata
            self._written[key] = max(depends, self._written.get(key, Depends.CONSTANT))

    def written_state(self) -> set[str]:
        """Names of the parameters and buffers into whose memory something was written."""
        return {
            name
            for tensor in self.values
            if (name := self.tensors.get(id(tensor))) is not None
            and _has_memory(tensor)
            and tensor.untyped_storage()._cdata in self._written
        }

    def origin(self, name: str, args: Any, kwargs: Any) -> Origin:
        """What the result of a call depends on, by what it is given and by the function's name."""
        depends = shape = Depends.CONSTANT
        by_number = name not in operators.ELEMENTWISE
        for leaf in leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                depends = max(depends, self.depends(leaf))
                shape = max(shape, self.known(leaf).shape)
            elif self.owns(leaf):
                depends = max(depends, leaf.depends)
                if by_number and isinstance(leaf, int):
                    shape = max(shape, leaf.depends)
        if (
            name in operators.SIZED_BY_VALUES
            or (
                name in operators.SIZED_BY_SECOND and (holds_tensor((args[1:], kwargs)) or len(args) + len(kwargs) == 1)
            )
            or (name in ("__getitem__", "index") and any(map(_is_mask, leaves(args[1:]))))
            or (name == "where" and len(args) == 1)
        ):
            shape = max(shape, depends)
        if name in operators.SHAPED_AS_FIRST or operators.is_in_place(name):
            shape = self.known(args[0]).shape if args and isinstance(args[0], torch.Tensor) else shape
        if name in operators.SHAPE_ONLY:
            depends = shape
        if name in RANDOM or _drops(name, args, kwargs):
            depends = Depends.DATA
        return Origin(depends, shape, depends)


def apart(result: Any, given: Any) -> Any:
    """`result`, with a tensor of its own for one that was given: each tensor stands for one node.

    Only in this run are the two one: a dropout at rest gives its input back, `to` does where nothing is to be done, and
    opaque code may for the values of the example.
    """
    if isinstance(result, torch.Tensor):
        if any(result is leaf for leaf in leaves(given)) and _has_memory(result) and not result.is_nested:
            with torch.enable_grad():  # with the history of what was given
                return result.view_as(result)
        return result
    if type(result) in (tuple, list):
        return type(result)(apart(item, given) for item in result)
    return result


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def metadata_of(tensor: torch.Tensor) -> TensorMetadata:
    """What torch.fx's own shape propagation notes of a tensor; that imports half a compiler to find it out."""
    last = _CHANNELS_LAST.get(tensor.dim()) if _has_memory(tensor) else None
    layout = torch.contiguous_format if tensor.is_contiguous() else None
    if layout is None and last is not None and tensor.is_contiguous(memory_format=last):
        layout = last
    return TensorMetadata(
        shape=tensor.shape,
        dtype=tensor.dtype,
        requires_grad=tensor.requires_grad,
        stride=tensor.stride(),
        memory_format=layout,
        is_quantized=tensor.is_quantized,
        qparams={},
    )


def leaves(value: Any) -> Iterator[Any]:
    """What plain lists, tuples, dicts and slices hold."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    else:
        yield value


def holds_tensor(value: Any) -> bool:
    """Whether there is a tensor among the leaves."""
    return any(isinstance(leaf, torch.Tensor) for leaf in leaves(value))


def _has_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a plain one: not sparse, and not the view of one that a transform such as vmap shows."""
    return tensor.layout is torch.strided and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def is_tensor(node: fx.Node) -> bool:
    """Whether a node computes a tensor."""
    return "tensor_meta" in node.meta


def _drops(name: str, args: Any, kwargs: Any) -> bool:
    if "dropout" not in name:
        return False
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    return bool(training)
