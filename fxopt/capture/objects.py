"""Values that are made of others: what stands for them in a graph, and what a forward does to them.

A list, a dict or an object that a forward is given, or that it makes and hands on, may change after the node
that stands for it. What changed is recorded before the node is used again, and at the end.
"""

from __future__ import annotations

import enum
import operator
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
import torch.fx as fx

from fxopt.capture.describe import describe
from fxopt.capture.guards import class_name, guard_class, guard_input, guard_items, guard_rank
from fxopt.capture.provenance import Depends
from fxopt.capture.sizes import TracedSize
from fxopt.capture.structure import Build, TheClass, put_attribute, put_item, replace_items
from fxopt.capture.tape import Unrecordable
from fxopt.capture.tensors import Origin, Tensors, holds_tensor
from fxopt.capture.traced import Sink, Traced, plain, traced
from fxopt.nested import attributes_of, items_of

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
# Torch takes Python's number types for these.
_DTYPES: dict[type, torch.dtype] = {bool: torch.bool, int: torch.int64, float: torch.float64, complex: torch.complex128}
_FIXED = (bool, str, type(None))
# Inputs that no node computes with. Members of an `enum` may be numbers too.
_GUARDED = (enum.Enum, *_FIXED, complex, bytes, range, slice, torch.dtype, torch.layout, torch.memory_format, type(...))


class Objects(Tensors):
    """Containers and objects, and their nodes."""

    def __init__(self, tensors: Mapping[int, str], static: Collection[torch.Tensor]) -> None:
        super().__init__(tensors)
        self._static = {id(tensor) for tensor in static}
        self._objects: dict[int, tuple[Any, fx.Node]] = {}
        self._contents: dict[int, tuple[dict[str, Any], Any]] = {}
        self._given: list[Any] = []
        self._catching_up: set[int] = set()
        self._devices: dict[int, tuple[torch.device, fx.Node]] = {}

    # From values to nodes

    def argument(self, value: Any, *, for_torch: bool = True) -> Any:
        """What stands for a value in the arguments of a node.

        Torch takes any tuple for a shape. What a module returns or keeps is read by Python code: there it is a
        `torch.Size`.

        Raises:
            Unrecordable: nothing can.
        """
        if isinstance(value, torch.Tensor):
            return self.known(value).node
        if isinstance(value, Traced):
            return value.node if self.owns(value) else plain(value)
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, torch.device) and id(value) in self._devices:
            return self._devices[id(value)][1]
        if isinstance(value, _LITERALS):
            return str(value) if isinstance(value, str) else value
        if isinstance(value, type) and value in _DTYPES:
            return _DTYPES[value]
        if isinstance(value, type):
            return self.emit("call_function", TheClass(value))
        if id(value) in self._objects:
            self._catch_up(value)
            return self._objects[id(value)][1]
        kind = type(value)
        if kind in (list, tuple, torch.Size, TracedSize):
            items = [self.argument(item, for_torch=for_torch) for item in value]
            if kind in (torch.Size, TracedSize) and not for_torch:
                return self.emit("call_function", Build(torch.Size), ({}, items))
            return items if kind is list else tuple(items)
        if kind is slice:
            return slice(self.argument(value.start), self.argument(value.stop), self.argument(value.step))
        if kind is dict:
            return {key: self.argument(item, for_torch=for_torch) for key, item in value.items()}
        return self._built(value)

    def _built(self, value: Any) -> fx.Node:
        attributes, items = attributes_of(value), items_of(value)
        if attributes is None:
            raise Unrecordable(f"a {type(value).__name__} among the arguments")
        placeholder = self.graph.create_node("placeholder", "cycle")
        self._objects[id(value)] = (value, placeholder)
        parts = (self.argument(attributes, for_torch=False), self.argument(items, for_torch=False))
        del self._objects[id(value)]
        if placeholder.users:
            raise Unrecordable(f"a {type(value).__name__} that contains itself")
        self.graph.erase_node(placeholder)
        node = self.emit("call_function", Build(type(value)), parts)
        self._track(value, node)
        return node

    # From nodes to values

    def adopt(self, node: fx.Node, value: Any, origin: Origin) -> Any:
        """Let `node` stand for `value`, and nodes behind it for what `value` contains.

        Returns the value, in which numbers are traced.
        """
        if isinstance(value, torch.Tensor):
            if origin.given:
                self.emit("call_function", guard_rank, (node, value.dim(), describe(node)))
            if id(value) in self._static:
                origin = origin._replace(values=Depends.SHAPE)
            return self.adopt_tensor(node, value, origin)
        if isinstance(value, _GUARDED if origin.given else _FIXED):
            if origin.given:
                self.emit("call_function", guard_input, (node, value, describe(node)))
            return value
        if isinstance(value, (int, float)):
            return traced(value, node, origin.numbers, cast("Sink", self))
        if origin.given and isinstance(value, (list, tuple, dict)):
            expected = list(value) if isinstance(value, dict) else len(value)
            self.emit("call_function", guard_items, (node, expected, describe(node)))
        if type(value) in (tuple, torch.Size) or (type(value) in (dict, list) and not origin.given):
            items = [self._adopt_item(node, key, item, origin) for key, item in _pairs(value)]
            if isinstance(value, dict):
                return dict(zip(value, items, strict=True))
            return TracedSize(items) if isinstance(value, torch.Size) else type(value)(items)
        if isinstance(value, tuple) and attributes_of(value) in ({}, None):
            items = [self._adopt_item(node, key, item, origin) for key, item in _pairs(value)]
            return type(value)(*items) if hasattr(value, "_fields") else value
        if isinstance(value, torch.device):
            self._devices[id(value)] = (value, node)
        elif origin.given and attributes_of(value) is None and not isinstance(value, torch.Generator):
            self.block(f"{describe(node)} is a {type(value).__name__}, whose contents a graph can't follow")
        return self._adopt_object(node, value, origin)

    def _adopt_item(self, node: fx.Node, key: Any, item: Any, origin: Origin) -> Any:
        if isinstance(item, _FIXED) and not origin.given:
            return item
        return self.adopt(self.emit("call_function", operator.getitem, (node, key)), item, origin)

    def _adopt_object(self, node: fx.Node, value: Any, origin: Origin) -> Any:
        attributes, items = attributes_of(value), items_of(value)
        if attributes is None and items is None:
            return value
        self._objects[id(value)] = (value, node)
        if origin.given and attributes:
            self.emit("call_function", guard_class, (node, class_name(value), describe(node)))
        for key, item in _pairs(items):
            adopted = self._adopt_item(node, key, item, origin)
            if adopted is not item and origin.given:
                put_item(value, key, adopted)
        for name, item in (attributes or {}).items():
            if not (origin.given and isinstance(item, (*_GUARDED, int, float))) and not _is_made_of_others(item):
                continue
            if id(item) in self._objects or (isinstance(item, torch.Tensor) and item in self.values):
                continue
            adopted = self.adopt(self.emit("call_function", getattr, (node, name)), item, origin)
            if adopted is not item and origin.given:
                put_attribute(value, name, adopted)
        self._track(value, node)
        if origin.given:
            self._given.append(value)
        return value

    # What changes

    def _track(self, value: Any, node: fx.Node) -> None:
        attributes, items = attributes_of(value) or {}, items_of(value)
        self._objects[id(value)] = (value, node)
        self._contents[id(value)] = (dict(attributes), items)
        for name, item in attributes.items():
            if type(item) in (list, dict) and id(item) not in self._objects:
                self._track(item, self.emit("call_function", getattr, (node, name)))
        for key, item in _pairs(items):
            if type(item) in (list, dict) and id(item) not in self._objects:
                self._track(item, self.emit("call_function", operator.getitem, (node, key)))

    def _catch_up(self, value: Any) -> None:
        """Record what was done to a tracked object since its node was last right."""
        if id(value) not in self._contents:
            return
        with self._once(value) as is_first:
            if not is_first:
                return
            node = self._objects[id(value)][1]
            attributes, items = attributes_of(value) or {}, items_of(value)
            old_attributes, old_items = self._contents[id(value)]
            for part in (*attributes.values(), *(item for _, item in _pairs(items))):
                if id(part) in self._contents:
                    self._catch_up(part)
            if isinstance(value, (dict, list)) and _differs(old_items, items):
                self.emit("call_function", replace_items, (node, self.argument(items, for_torch=False)))
            changed = [n for n in attributes if n not in old_attributes or attributes[n] is not old_attributes[n]]
            for name in changed:
                self.emit("call_function", setattr, (node, name, self.argument(attributes[name], for_torch=False)))
            for name in [name for name in old_attributes if name not in attributes]:
                self.emit("call_function", delattr, (node, name))
            self._track(value, node)

    @contextmanager
    def _once(self, value: Any) -> Iterator[bool]:
        is_first = id(value) not in self._catching_up
        self._catching_up.add(id(value))
        try:
            yield is_first
        finally:
            if is_first:
                self._catching_up.discard(id(value))

    def record_changed_objects(self) -> None:
        """Record what the forward did to the objects that it was given, such as a cache that it filled."""
        for value in self._given:
            self._catch_up(value)

    def take_up_changes(self, value: Any) -> None:
        """Let nodes stand for what a call that is one node wrote into the objects that it was given."""
        if id(value) in self._contents:
            with self._once(value) as is_first:
                if is_first:
                    self._take_up(value)
        elif type(value) in (list, tuple, dict):
            for _, item in _pairs(value):
                self.take_up_changes(item)

    def _take_up(self, value: Any) -> None:
        origin = Origin(Depends.DATA, Depends.SHAPE, Depends.DATA)
        node = self._objects[id(value)][1]
        attributes, items = attributes_of(value) or {}, items_of(value)
        old_attributes, old_items = self._contents[id(value)]
        for name, item in attributes.items():
            if name in old_attributes and old_attributes[name] is item:
                self.take_up_changes(item)
            elif _is_made_of_others(item) or (isinstance(item, (int, float)) and not isinstance(item, bool)):
                adopted = self.adopt(self.emit("call_function", getattr, (node, name)), item, origin)
                if isinstance(adopted, Traced):
                    put_attribute(value, name, adopted)
        old = dict(_pairs(old_items))
        for key, item in _pairs(items):
            if key in old and old[key] is item:
                self.take_up_changes(item)
            elif _is_made_of_others(item):
                self._adopt_item(node, key, item, origin)
        self._track(value, node)


def _is_made_of_others(item: Any) -> bool:
    return holds_tensor(item) or bool(attributes_of(item)) or type(item) in (list, dict)


def _pairs(items: Any) -> list[tuple[Any, Any]]:
    if items is None:
        return []
    return list(items.items()) if isinstance(items, dict) else list(enumerate(items))


def _differs(before: Any, after: Any) -> bool:
    if isinstance(before, dict):
        return list(before) != list(after) or any(before[key] is not after[key] for key in before)
    return len(before) != len(after) or any(a is not b for a, b in zip(before, after, strict=True))
