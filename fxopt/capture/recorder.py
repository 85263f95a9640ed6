"""Records one forward of a module as an fx graph, with real values going through the user's code.

The classes below it, each in a file of its own, hold one idea each: the tape of nodes, what tensors depend on,
values made of others, and decisions on numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
import torch.fx as fx
from torch import nn
from torch.overrides import TorchFunctionMode

from fxopt.capture import operators
from fxopt.capture.blamed_inputs import not_static
from fxopt.capture.decisions import Decisions
from fxopt.capture.frames import called
from fxopt.capture.provenance import Depends
from fxopt.capture.sizes import TracedSize
from fxopt.capture.tape import Unrecordable
from fxopt.capture.tensors import Origin, apart, holds_tensor, is_tensor, leaves
from fxopt.capture.traced import Traced, plain, traced
from fxopt.graph.effects import OF_NUMBERS

_MOST_TRACED = 64
"""Numbers of one list that are followed each by itself; a longer one is guarded as a whole."""
_FREE = (
    OF_NUMBERS
    | {getattr, operator.getitem, operator.truth, operator.pos, operator.neg, operator.abs}
    | {
        getattr(operator, name)
        for name in "add sub mul truediv floordiv mod pow and_ or_ xor lshift rshift eq ne lt le gt ge".split()
    }
)


class Recorder(Decisions, TorchFunctionMode):
    """What torch is asked to do while a module runs.

    Args:
        root: the module that is recorded.
        modules: path of each module, by identity.
        tensors: qualified name of each parameter and buffer, by identity.
        static: tensors among the inputs by whose values Python code may decide.

    Attributes:
        asked_mode: paths of modules that read their `training` flag.
        calls: torch calls in the graph.
    """

    def __init__(
        self,
        root: nn.Module,
        modules: Mapping[int, str],
        tensors: Mapping[int, str],
        static: Collection[torch.Tensor] = (),
    ):
        super().__init__(tensors, static)
        self.root = root
        self.modules = modules
        self.asked_mode: set[str] = set()
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.active:
            return func(*args, **kwargs)
        self.active = False
        try:
            return self._call(func, args, kwargs)
        finally:
            self.active = True

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = func.__name__
        if name == "__get__":
            return self._property(func, args[0])
        if name == "__set__":
            return self._set_property(func, args)
        if name in operators.SHAPE_READS:
            return self._sizes_of(func, args, kwargs)
        if name in operators.DTYPE_READS:
            self.asked_dtype(args[0] if args else kwargs["input"])
        if args and isinstance(args[0], torch.Tensor) and operators.is_in_place(name):
            self.known(args[0])  # met as it is before the write, which may give it a history
        with self.noting_errors(name):
            result = func(*_plain(args), **_plain(kwargs))
        if result is NotImplemented or name in operators.SILENT:
            return result
        if name in operators.HOOKS:
            self.block(f"it hangs a hook on a gradient ('{name}')")
            return result
        if name in operators.VALUE_READS or name in operators.CONCRETE_READS:
            return self._read(name, func, args, kwargs, result)
        if not holds_tensor(result) and name not in operators.IN_PLACE_NAMES and name not in operators.STATE_SETTERS:
            return result
        given = list(leaves((args, kwargs)))
        if any(isinstance(leaf, np.ndarray) for leaf in given) and not holds_tensor(given):
            self.take_as_fixed(result)
            return result
        self.calls += 1
        try:
            return self.record(func, args, kwargs, result)
        except Unrecordable as reason:
            self.block(f"'{name}' was given {reason}")
            return result

    def record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Append a call that has been made, and take up its result."""
        op, target, call_args = operators.as_call(func, args, kwargs)
        node_args, node_kwargs = self.argument(call_args), self.argument(kwargs)
        name = func.__name__
        origin = self.origin(name, args, kwargs)
        node = self.emit(op, target, node_args, node_kwargs)
        in_place = operators.is_in_place(name) or kwargs.get("inplace") is True
        written = [args[0] if args and in_place else None, kwargs.get("out")]
        for tensor in written:
            if isinstance(tensor, torch.Tensor):
                self.note_write(tensor, origin.values)
        if origin.shape is not Depends.CONSTANT:
            if name in operators.TAKEN_APART:
                self._count_parts(node, name, [*args, *kwargs.values()], kwargs, result, origin.shape)
            elif name in operators.RANKED_BY_SIZE:
                self._fix_rank(node, name, [*args, *kwargs.values()], result, origin.shape)
        if not any(result is tensor for tensor in written):
            result = apart(result, (args, kwargs))
        return self.adopt(node, result, origin)

    def _count_parts(
        self, node: fx.Node, name: str, given: list[Any], kwargs: Any, parts: tuple[Any, ...], shape: Depends
    ) -> None:
        if any(isinstance(sizes, (list, tuple)) for sizes in given):
            return  # `split` into a list of sizes gives a part for each
        place = 1 if name == "unbind" else 2
        dim = kwargs.get("dim", given[place] if len(given) > place else 0)
        if shape is Depends.DATA and not _is_last(given, dim):
            self.block(f"it takes a tensor apart ('{name}') whose size depends on the values of the input")
        else:
            self.counted(node, name, parts)

    def _fix_rank(self, node: fx.Node, name: str, given: list[Any], result: torch.Tensor, shape: Depends) -> None:
        if shape is Depends.DATA and not (len(given) > 1 and _is_last(given, given[1])):
            self.block(f"it takes dimensions away ('{name}') whose size depends on the values of the input")
        else:
            self.ranked(node, name, result)

    # Reading

    def _property(self, func: Any, tensor: torch.Tensor) -> Any:
        name = func.__self__.__name__
        value = func(tensor)
        if name == "shape":
            known = self.known(tensor)
            if known.shape is Depends.CONSTANT:
                return value
            return TracedSize(self.size(known, dim, size) for dim, size in enumerate(value))
        if name == "nbytes" and (shape := self.known(tensor).shape) is not Depends.CONSTANT:
            node = self.emit("call_function", getattr, (self.known(tensor).node, name))
            return self.adopt(node, value, Origin(shape, shape, shape))
        if name == "dtype":
            self.asked_dtype(tensor)
        if name == "device" and tensor in self.values:
            self._devices[id(value)] = (value, self.emit("call_function", getattr, (self.known(tensor).node, name)))
        if name in operators.TENSOR_PROPERTIES and isinstance(value, torch.Tensor):
            known = self.known(tensor)
            node = self.emit("call_function", getattr, (known.node, name))
            depends = self.depends(tensor)
            return self.adopt(node, value, Origin(depends, known.shape, depends))
        return value

    def _set_property(self, func: Any, args: tuple[Any, ...]) -> Any:
        tensor, value = args[0], args[1] if len(args) > 1 else None
        func(*args)
        name = func.__self__.__name__
        if isinstance(value, torch.Tensor):
            self.emit("call_function", setattr, (self.known(tensor).node, name, self.known(value).node))
            self.note_write(tensor, self.known(value).depends)

    def _sizes_of(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = args[0] if args else kwargs["input"]
        known = self.known(tensor)
        real_args, real_kwargs = _plain(args), _plain(kwargs)
        value = func(*real_args, **real_kwargs)
        if known.shape is Depends.CONSTANT:
            return value
        name = func.__name__
        if name == "size":
            dims = [*real_args[1:], *real_kwargs.values()]
            if not dims or dims[0] is None:
                return TracedSize(self.size(known, dim, size) for dim, size in enumerate(value))
            return self.size(known, dims[0] % tensor.dim(), value)
        if name == "__len__":
            # The interpreter makes a plain int of what __len__ returns; `len` itself is replaced while recording.
            if called() not in ("list", "tuple"):  # which only make room, and then count the parts
                self.compared("==", self.size(known, 0, value), value, True)
            return value
        node = self.emit("call_method", name, (known.node, *real_args[1:]))
        return self.adopt(node, value, Origin(known.shape, known.shape, known.shape))

    def length(self, tensor: torch.Tensor) -> Any:
        """`len(tensor)` as a traced number."""
        known = self.known(tensor)
        size = tensor.size(0)
        return size if known.shape is Depends.CONSTANT else self.size(known, 0, size)

    def _read(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        depends = self.origin(name, args, kwargs).values
        tensor = args[0]
        if name in operators.VALUE_READS:
            shape = self.known(tensor).shape
            if isinstance(result, list) and (shape is Depends.DATA or _may_count(depends, tensor)):
                named = not_static(self.known(tensor).node)
                self.block(f"it makes a list of a tensor ('{name}()') that depends on the values of the input{named}")
                return result
            if isinstance(result, list) and depends is Depends.SHAPE and tensor.numel() > _MOST_TRACED:
                self.read_whole(tensor)
                return result
            node = self.emit("call_method", name, (self.known(tensor).node,))
            if isinstance(result, bool):
                self.decided(node, result, depends, f"'{name}()'")
                return result
            if isinstance(result, list) and shape is not Depends.CONSTANT:
                self.received(node, result, "'tolist()'")
            return self.adopt(node, result, Origin(depends, depends, depends))
        if isinstance(result, bool):
            op, target, call_args = operators.as_call(func, args, kwargs)
            if name == "__bool__":
                op, target = "call_function", operator.truth
            node = self.emit(op, target, self.argument(call_args), self.argument(kwargs))
            self.decided(node, result, depends, f"'{name.strip('_')}'")
        elif isinstance(result, (int, float)):
            node = self.emit("call_method", "item", (self.known(tensor).node,))
            self.compared("==", traced(result, node, depends, self), result, True)
        elif depends is Depends.DATA:
            named = not_static(self.known(tensor).node)
            self.block(f"it reads the values of a tensor ('{name.strip('_')}'), which depend on the input{named}")
        else:
            self.read_whole(tensor)
        return result

    # The end

    def drop_unused(self) -> None:
        """Erase sizes, items, values and arithmetic that nothing came to use."""
        reads = operators.SHAPE_READS | operators.VALUE_READS
        for node in reversed(self.graph.nodes):
            is_read = node.op == "get_attr" or (node.op == "call_method" and node.target in reads)
            is_sum = node.op == "call_function" and node.target in _FREE and not is_tensor(node)
            if not node.users and (is_read or is_sum or node.target is operator.getitem or node.target is getattr):
                self.graph.erase_node(node)


def _is_last(given: list[Any], dim: Any) -> bool:
    """Whether `dim` is the last of the tensor's: what values size is so in its first ones, as rows that are picked."""
    dims = next(value for value in given if isinstance(value, torch.Tensor)).dim()
    return dims > 1 and isinstance(dim, int) and plain(dim) % dims == dims - 1


def _may_count(depends: Depends, tensor: torch.Tensor) -> bool:
    """Whether numbers of a tensor are lengths or places that depend on values, which Python code goes through."""
    return depends is Depends.DATA and not tensor.is_floating_point()


def _plain(value: Any) -> Any:
    """Arguments without traced numbers. The same object where there are none."""
    if isinstance(value, Traced):
        return plain(value)
    kind = type(value)
    if kind in (list, tuple):
        return kind(_plain(item) for item in value)
    if kind in (torch.Size, TracedSize):
        return torch.Size(map(_plain, value))
    if kind is dict:
        return {key: _plain(item) for key, item in value.items()}
    if kind is slice:
        return slice(_plain(value.start), _plain(value.stop), _plain(value.step))
    return value
