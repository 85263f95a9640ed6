"""Objects that hold tensors: model outputs, dataclasses, caches. How a graph builds, changes and uses them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from fxopt.capture.sizes import TracedSize
from fxopt.capture.traced import Traced, plain
from fxopt.nested import attributes_of, items_of


class OfClass:
    """A node's target that does something with one class, which generated code can't name."""

    verb: ClassVar[str]

    def __init__(self, cls: type):
        self.cls = cls
        self.__name__ = f"{self.verb}_{cls.__name__}"
        self.__module__ = __name__

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other.cls is self.cls

    def __hash__(self) -> int:
        return hash((type(self), self.cls))

    def __repr__(self) -> str:
        return self.__name__


class Build(OfClass):
    """Builds an object of the class from its parts, without running its `__init__`."""

    verb = "build"

    def __call__(self, attributes: Mapping[str, Any], items: Any = None) -> Any:
        """Make an object with these attributes and, for a dict, list or tuple, items."""
        cls: Any = self.cls
        if issubclass(cls, tuple):
            return cls(*items) if hasattr(cls, "_fields") else cls(items)
        result = cls.__new__(cls)
        if issubclass(cls, dict):
            # Model outputs override __setitem__ to set attributes, which come below.
            base: Any = OrderedDict if issubclass(cls, OrderedDict) else dict
            for key, value in items.items():
                base.__setitem__(result, key, value)
        elif issubclass(cls, list):
            list.extend(result, items)
        for name, value in attributes.items():
            object.__setattr__(result, name, value)
        return result


class TheClass(OfClass):
    """Gives the class itself."""

    verb = "the_class"

    def __call__(self) -> type:
        """Give it."""
        return self.cls


class Apply(OfClass):
    """Applies an autograd function. Its `apply` is torch's, by the name of which nobody finds it."""

    verb = "apply"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Apply it."""
        return self.cls.apply(*args, **kwargs)  # type: ignore[attr-defined]


def replace_items(container: Any, items: Any) -> None:
    """Give a list or dict that was passed in the contents that the forward left in it."""
    container.clear()
    if isinstance(container, dict):
        container.update(items)
    else:
        container.extend(items)


def put_item(container: Any, key: Any, item: Any) -> None:
    """Set an item as its base class does: model outputs override it to set attributes as well."""
    (dict if isinstance(container, dict) else list).__setitem__(container, key, item)


def put_attribute(value: Any, name: str, item: Any) -> None:
    """Set an attribute, of a frozen dataclass too."""
    value.__dict__[name] = item


def without_numbers(value: Any, seen: set[int] | None = None) -> Any:
    """The same value with plain numbers for traced ones. Lists, dicts and objects are changed in place."""
    seen = set() if seen is None else seen
    if isinstance(value, Traced):
        return plain(value)
    if type(value) in (tuple, torch.Size, TracedSize):
        kind = tuple if type(value) is tuple else torch.Size
        return kind(without_numbers(item, seen) for item in value)
    items, attributes = items_of(value), attributes_of(value)
    if (items is None and not attributes) or id(value) in seen:
        return value
    seen.add(id(value))
    if isinstance(value, (dict, list)):
        for key, item in items.items() if isinstance(items, dict) else enumerate(items):
            replaced = without_numbers(item, seen)
            if replaced is not item:
                put_item(value, key, replaced)
    for name, item in (attributes or {}).items():
        replaced = without_numbers(item, seen)
        if replaced is not item:
            put_attribute(value, name, replaced)
    return value
