"""Records one forward of a module as an fx graph, with real values going through the user's code."""

from __future__ import annotations

import enum
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.fx as fx
from torch import nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils.weak import WeakTensorKeyDictionary

from fxopt.capture import operators
from fxopt.capture.captured import Guard
from fxopt.capture.frames import user_source
from fxopt.capture.guards import guard, guard_tensor
from fxopt.capture.provenance import Depends
from fxopt.capture.structure import Build, attributes_of, items_of, replace_items
from fxopt.capture.traced import Traced, plain, traced

_LITERALS = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    type(...),
    torch.dtype,
    torch.layout,
    torch.memory_format,
    torch.device,
    enum.Enum,
    range,
)
_FREE = frozenset({getattr, operator.getitem, operator.pos, operator.neg, operator.abs}) | {
    getattr(operator, name)
    for name in "add sub mul truediv floordiv mod pow and_ or_ xor lshift rshift eq ne lt le gt ge".split()
}


class Unrecordable(Exception):
    """A value that no node can stand for."""


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


class Recorder(TorchFunctionMode):
    """The graph in the making.

    Args:
        root: the module that is recorded.
        modules: path of each module, by identity.
        tensors: qualified name of each parameter and buffer, by identity.

    Attributes:
        blocked: modules that did what can't be recorded: path -> (reason, location).
        guards: what was assumed.
        met: unregistered tensors.
        arrays: names of those of them that were made of arrays.
        asked_mode: paths of modules that read their `training` flag.
    """

    def __init__(self, root: nn.Module, modules: Mapping[int, str], tensors: Mapping[int, str]):
        super().__init__()
        self.root = root
        self.modules = modules
        self.tensors = tensors
        self.graph = fx.Graph()
        self.values = WeakTensorKeyDictionary()
        self.stack: list[str] = [""]
        self.active = False
        self.blocked: dict[str, tuple[str, str]] = {}
        self.guards: dict[Guard, None] = {}
        self.met: list[Met] = []
        self.arrays: set[Any] = set()
        self.asked_mode: set[str] = set()
        self.calls = 0
        self._sizes: dict[tuple[fx.Node, int], fx.Node] = {}
        self._compared: set[Any] = set()
        self._devices: dict[int, tuple[torch.device, fx.Node]] = {}
        self._written: dict[int, Depends] = {}
        self.objects: dict[int, tuple[Any, fx.Node]] = {}
        self._contents: dict[int, tuple[Any, Any]] = {}

    @property
    def path(self) -> str:
        """The module whose forward is running."""
        return self.stack[-1]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run code without recording it, and without torch noticing that anything is recorded."""
        was, self.active = self.active, False
        try:
            with _pop_mode_temporarily():
                yield
        finally:
            self.active = was

    # What can't be recorded

    def block(self, reason: str, path: str | None = None) -> None:
        """Note that the running module did what can't be recorded; recording goes on to find the others."""
        source = user_source()
        self.blocked.setdefault(self.path if path is None else path, (reason, str(source or "")))

    # Nodes

    def emit(
        self, op: str, target: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> fx.Node:
        """Append a node whose arguments are nodes and literals already."""
        node = self.graph.create_node(op, target, args, dict(kwargs or {}))
        node.meta["module_path"] = self.path
        source = user_source()
        if source is not None:
            node.meta["source"] = source
        return node

    def argument(self, value: Any) -> Any:
        """What stands for a value in the arguments of a node."""
        if isinstance(value, torch.Tensor):
            return self.known(value).node
        if isinstance(value, Traced):
            return value.node if value.trace is self else plain(value)
        if isinstance(value, torch.device) and id(value) in self._devices:
            return self._devices[id(value)][1]
        if isinstance(value, _LITERALS):
            return value
        if id(value) in self.objects:
            return self.objects[id(value)][1]
        kind = type(value)
        if kind in (list, tuple, torch.Size):
            items = [self.argument(item) for item in value]
            return items if kind is list else tuple(items)
        if kind is slice:
            return slice(self.argument(value.start), self.argument(value.stop), self.argument(value.step))
        if kind is dict:
            return {key: self.argument(item) for key, item in value.items()}
        if isinstance(value, np.generic):
            return value.item()
        return self._object(value)

    def _object(self, value: Any) -> fx.Node:
        attributes, items = attributes_of(value), items_of(value)
        if attributes is None:
            raise Unrecordable(f"a {type(value).__name__} among the arguments")
        self.objects[id(value)] = (value, self.graph.create_node("placeholder", "cycle"))
        placeholder = self.objects[id(value)][1]
        parts = (self.argument(attributes), self.argument(items))
        if placeholder.users:
            raise Unrecordable(f"a {type(value).__name__} that contains itself")
        self.graph.erase_node(placeholder)
        node = self.emit("call_function", Build(type(value)), parts)
        self.objects[id(value)] = (value, node)
        return node

    def known(self, tensor: torch.Tensor) -> Value:
        """What is known of a tensor; a parameter, buffer or constant is met here for the first time."""
        value: Value | None = self.values.get(tensor)
        if value is None:
            name = self.tensors.get(id(tensor))
            if name is None:
                if tensor.requires_grad and tensor.grad_fn is not None:
                    self.block("it uses a tensor that was computed before or outside of what torch lets be recorded")
                name = f"_constant_{len(self.met)}"
                self.met.append(Met(tensor, name, self.path, str(user_source() or "")))
            value = Value(self.emit("get_attr", name), Depends.CONSTANT, Depends.CONSTANT)
            value.node.meta["tensor_meta"] = _extract_tensor_metadata(tensor)
            self.values[tensor] = value
        return value

    # Torch's calls

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
        if name == "__iter__":
            return self._iterate(args[0])
        real_args, real_kwargs = _plain(args), _plain(kwargs)
        result = func(*real_args, **real_kwargs)
        if result is NotImplemented or name in operators.SILENT:
            return result
        if name in operators.VALUE_READS or name in operators.CONCRETE_READS:
            return self._read(name, func, args, kwargs, result)
        if not _holds_tensor(result) and name not in operators.IN_PLACE_NAMES and name not in operators.STATE_SETTERS:
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
        depends, shape = self._provenance(name, args, kwargs)
        node = self.emit(op, target, node_args, node_kwargs)
        written = args[0] if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) else None
        for target_tensor in (written, kwargs.get("out")):
            if isinstance(target_tensor, torch.Tensor):
                self._note_write(target_tensor, depends)
        return self.adopt(node, result, depends, shape)

    def _provenance(self, name: str, args: Any, kwargs: Any) -> tuple[Depends, Depends]:
        depends = shape = Depends.CONSTANT
        by_number = name not in operators.ELEMENTWISE
        boolean_index = False
        for leaf in _leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor):
                value = self.known(leaf)
                depends = max(depends, self._depends(leaf, value))
                shape = max(shape, value.shape)
                boolean_index = boolean_index or leaf.dtype in (torch.bool, torch.uint8)
            elif isinstance(leaf, Traced) and leaf.trace is self:
                depends = max(depends, leaf.depends)
                if by_number and isinstance(leaf, int):
                    shape = max(shape, leaf.depends)
        if (
            name in operators.SIZED_BY_VALUES
            or (name in ("__getitem__", "index") and boolean_index)
            or (name == "where" and len(args) == 1)
        ):
            shape = max(shape, depends)
        if name in operators.SHAPE_ONLY:
            depends = shape
        if name in operators.RANDOM or _drops(name, args, kwargs):
            depends = Depends.DATA
        return depends, shape

    def _depends(self, tensor: torch.Tensor, value: Value) -> Depends:
        if not self._written or tensor.layout is not torch.strided:
            return value.depends
        return max(value.depends, self._written.get(tensor.untyped_storage()._cdata, Depends.CONSTANT))

    def _note_write(self, tensor: torch.Tensor, depends: Depends) -> None:
        value = self.known(tensor)
        value.depends = max(value.depends, depends)
        if tensor.layout is torch.strided:
            key = tensor.untyped_storage()._cdata
            self._written[key] = max(depends, self._written.get(key, Depends.CONSTANT))

    # Results

    def adopt(self, node: fx.Node, value: Any, depends: Depends, shape: Depends) -> Any:
        """Let `node` stand for `value`, and nodes behind it for what `value` contains.

        Returns the value, in which numbers are traced.
        """
        if isinstance(value, torch.Tensor):
            if isinstance(value, nn.Parameter) and id(value) in self.tensors:
                pass
            elif value.layout is torch.strided and self._written and value not in self.values:
                fresh = value._base is None and value.grad_fn is None
                if fresh:
                    self._written.pop(value.untyped_storage()._cdata, None)
            self.values[value] = Value(node, depends, shape)
            if value.layout is torch.strided and not value.is_quantized:
                node.meta["tensor_meta"] = _extract_tensor_metadata(value)
            return value
        if isinstance(value, (bool, str, type(None))):
            return value
        if isinstance(value, (int, float)):
            return traced(value, node, depends, self)
        if type(value) is dict:
            return {key: self._adopt_item(node, key, item, depends, shape) for key, item in value.items()}
        if isinstance(value, (list, tuple)) and attributes_of(value) in ({}, None):
            items = [self._adopt_item(node, i, item, depends, shape) for i, item in enumerate(value)]
            if type(value) in (list, tuple):
                return type(value)(items)
            return value
        return self._adopt_object(node, value, depends, shape)

    def _adopt_item(self, node: fx.Node, key: Any, item: Any, depends: Depends, shape: Depends) -> Any:
        if isinstance(item, (bool, str, type(None))):
            return item
        return self.adopt(self.emit("call_function", operator.getitem, (node, key)), item, depends, shape)

    def _adopt_object(self, node: fx.Node, value: Any, depends: Depends, shape: Depends) -> Any:
        attributes, items = attributes_of(value), items_of(value)
        if attributes is None and items is None:
            return value
        self.objects[id(value)] = (value, node)
        self._contents[id(value)] = (dict(attributes or {}), items)
        if isinstance(value, dict):
            for key, item in items.items():
                self._adopt_item(node, key, item, depends, shape)
        elif isinstance(value, list):
            for index, item in enumerate(items):
                self._adopt_item(node, index, item, depends, shape)
        for key, item in (attributes or {}).items():
            if _holds_tensor(item) or attributes_of(item) or isinstance(item, list):
                part = self.emit("call_function", getattr, (node, key))
                if type(item) is list:
                    self._adopt_list(part, item, depends, shape)
                elif not isinstance(item, torch.Tensor) or item not in self.values:
                    self.adopt(part, item, depends, shape)
        return value

    def _adopt_list(self, node: fx.Node, value: list[Any], depends: Depends, shape: Depends) -> None:
        self.objects[id(value)] = (value, node)
        self._contents[id(value)] = ({}, list(value))
        for index, item in enumerate(value):
            self._adopt_item(node, index, item, depends, shape)

    def record_changed_objects(self) -> None:
        """Record what the forward did to the objects that it was given, such as a cache that it filled."""
        for key, (attributes, items) in list(self._contents.items()):
            value, node = self.objects[key]
            if isinstance(value, (dict, list)) and _differs(items, items_of(value)):
                self.emit("call_function", replace_items, (node, self.argument(items_of(value))))
            for name, item in (attributes_of(value) or {}).items():
                if name not in attributes or attributes[name] is not item:
                    self.emit("call_function", setattr, (node, name, self.argument(item)))

    # Reading

    def _property(self, func: Any, tensor: torch.Tensor) -> Any:
        name = func.__self__.__name__
        value = func(tensor)
        if name == "shape":
            known = self.known(tensor)
            if known.shape is Depends.CONSTANT:
                return value
            return torch.Size([self._size(known, dim, size) for dim, size in enumerate(value)])
        if name == "device" and self.values.get(tensor) is not None:
            self._devices[id(value)] = (value, self.emit("call_function", getattr, (self.known(tensor).node, name)))
        if name in operators.TENSOR_PROPERTIES and isinstance(value, torch.Tensor):
            known = self.known(tensor)
            node = self.emit("call_function", getattr, (known.node, name))
            return self.adopt(node, value, self._depends(tensor, known), known.shape)
        return value

    def _set_property(self, func: Any, args: tuple[Any, ...]) -> Any:
        tensor, value = args[0], args[1] if len(args) > 1 else None
        func(*args)
        name = func.__self__.__name__
        if isinstance(value, torch.Tensor):
            self.emit("call_function", setattr, (self.known(tensor).node, name, self.known(value).node))
            self._note_write(tensor, self.known(value).depends)

    def _size(self, known: Value, dim: int, size: int) -> Any:
        key = (known.node, dim)
        if key not in self._sizes:
            self._sizes[key] = self.emit("call_method", "size", (known.node, dim))
        return traced(size, self._sizes[key], known.shape, self)

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
                return torch.Size([self._size(known, dim, size) for dim, size in enumerate(value)])
            return self._size(known, dims[0] % tensor.dim(), value)
        if name == "__len__":
            # The interpreter makes a plain int of what __len__ returns; `len` itself is replaced while recording.
            self.compared("==", self._size(known, 0, value), value, True)
            return value
        node = self.emit("call_method", name, (known.node, *real_args[1:]))
        return self.adopt(node, value, known.shape, known.shape)

    def length(self, tensor: torch.Tensor) -> Any:
        """`len(tensor)` as a traced number."""
        known = self.known(tensor)
        size = tensor.size(0)
        return size if known.shape is Depends.CONSTANT else self._size(known, 0, size)

    def _iterate(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        parts = torch.Tensor.unbind(tensor, 0)
        known = self.known(tensor)
        if known.shape is not Depends.CONSTANT:
            self.compared("==", self._size(known, 0, len(parts)), len(parts), True)
        result: tuple[torch.Tensor, ...] = self.record(torch.Tensor.unbind, (tensor, 0), {}, parts)
        return iter(result)

    def _read(self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        depends, _ = self._provenance(name, args, kwargs)
        tensor = args[0]
        if name in operators.VALUE_READS:
            if depends is Depends.DATA and not tensor.is_floating_point():
                # An int may index a list, which reads it unseen.
                self.block(f"it reads a number out of a tensor ('{name}()') that depends on the values of the input")
                return result
            node = self.emit("call_method", name, (self.known(tensor).node,))
            if isinstance(result, bool):
                self._decided(node, result, depends, f"'{name}()'")
                return result
            return self.adopt(node, result, depends, depends)
        if isinstance(result, bool):
            op, target, call_args = operators.as_call(func, args, kwargs)
            if name == "__bool__":
                op, target = "call_function", operator.truth
            node = self.emit(op, target, self.argument(call_args), self.argument(kwargs))
            self._decided(node, result, depends, f"'{name.strip('_')}'")
        elif isinstance(result, (int, float)):
            node = self.emit("call_method", "item", (self.known(tensor).node,))
            self.compared("==", traced(result, node, depends, self), result, True)
        elif depends is Depends.DATA:
            self.block(f"it reads the values of a tensor ('{name.strip('_')}'), which depend on the input")
        else:
            self._read_all(tensor, name)
        return result

    def _read_all(self, tensor: torch.Tensor, name: str) -> None:
        known = self.known(tensor)
        if known.depends is Depends.CONSTANT:
            return
        kept = tensor.detach().clone()
        assumption, location = f"the values of {known.node.name}", str(user_source() or "")
        self.guards[Guard(assumption, location)] = None
        expected = self.known(kept).node
        self.emit("call_function", guard_tensor, (known.node, expected, assumption, location))

    def _decided(self, node: fx.Node, answer: bool, depends: Depends, what: str) -> None:
        if depends is Depends.DATA:
            self.block(f"it decides on the value of a tensor ({what}), which depends on the input")
        else:
            self._guard(node, "==", answer, True, f"{describe(node)} is {answer}")

    # Traced numbers

    def arithmetic(self, function: Callable[..., Any], operands: tuple[Any, ...], result: Any) -> Any:
        """Record an operation on numbers and return the traced result."""
        if not self.active:
            return result
        depends = max(value.depends for value in operands if isinstance(value, Traced))
        node = self.emit("call_function", function, tuple(self.argument(value) for value in operands))
        return traced(result, node, depends, self)

    def compared(self, relation: str, left: Traced, right: Any, answer: bool) -> None:
        """Guard the answer of a comparison of traced numbers, unless it depends on the values of the input."""
        if isinstance(right, Traced) and right.trace is self and right.node is left.node:
            return
        depends = max(left.depends, right.depends) if isinstance(right, Traced) else left.depends
        negated = relation if answer else _NEGATION[relation]
        assumption = f"{describe(left.node)} {negated} {describe(self.argument(right))}"
        if depends is Depends.DATA:
            self.block(f"it decides on a number that depends on the values of the input ({assumption})")
        else:
            self._guard(left.node, relation, self.argument(right), answer, assumption)

    def _guard(self, node: fx.Node, relation: str, expected: Any, answer: bool, assumption: str) -> None:
        key = (node, relation, expected, answer)
        if key in self._compared:
            return
        self._compared.add(key)
        location = str(user_source() or "")
        self.guards[Guard(assumption, location)] = None
        self.emit("call_function", guard, (node, relation, expected, answer, assumption, location))

    # The end

    def drop_unused(self) -> None:
        """Erase sizes, items and arithmetic that nothing came to use."""
        for node in reversed(self.graph.nodes):
            is_read = node.op == "get_attr" or (node.op == "call_method" and node.target in operators.SHAPE_READS)
            is_sum = node.op == "call_function" and node.target in _FREE and not _is_tensor(node)
            if not node.users and (is_read or is_sum or node.target is operator.getitem or node.target is getattr):
                self.graph.erase_node(node)


_NEGATION = {"==": "!=", "!=": "==", "<": ">=", "<=": ">", ">": "<=", ">=": "<"}


def describe(value: Any) -> str:
    """A node as its user would write it: `x.shape[2] // 2`."""
    if not isinstance(value, fx.Node):
        return repr(value)
    if value.op == "call_method" and value.target == "size":
        return f"{describe(value.args[0])}.shape[{value.args[1]}]"
    if value.op == "call_function" and len(value.args) == 2 and value.target in _SYMBOLS and not _is_tensor(value):
        return f"({describe(value.args[0])} {_SYMBOLS[value.target]} {describe(value.args[1])})"
    if value.op == "call_method" and value.target == "item":
        return f"{describe(value.args[0])}.item()"
    if value.op in ("get_attr", "call_module"):
        return str(value.target)
    return value.name


_SYMBOLS: dict[Any, str] = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.pow: "**",
}


def _is_tensor(node: fx.Node) -> bool:
    return "tensor_meta" in node.meta


def _drops(name: str, args: Any, kwargs: Any) -> bool:
    if "dropout" not in name:
        return False
    training = kwargs.get("training", args[2] if len(args) > 2 else True)
    return bool(training)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    else:
        yield value


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in _leaves(value))


def _plain(value: Any) -> Any:
    """Arguments without traced numbers. The same object where there are none."""
    if isinstance(value, Traced):
        return plain(value)
    kind = type(value)
    if kind in (list, tuple):
        return kind(_plain(item) for item in value)
    if kind is torch.Size:
        return torch.Size(_plain(item) for item in value)
    if kind is dict:
        return {key: _plain(item) for key, item in value.items()}
    if kind is slice:
        return slice(_plain(value.start), _plain(value.stop), _plain(value.step))
    return value


def _differs(before: Any, after: Any) -> bool:
    if isinstance(before, dict):
        return list(before) != list(after) or any(before[key] is not after[key] for key in before)
    return len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True))
