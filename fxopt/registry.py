"""Finds the passes that are installed, by entry point.

A package offers passes with an entry point in the group `fxopt.passes` that names a module with a tuple
`PASSES`. The library that comes with fxopt is found in the same way. This is the only dynamic import of code
that is not the user's model.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from types import MappingProxyType, ModuleType

from fxopt.contract import Pass, Promise
from fxopt.errors import PassError

GROUP = "fxopt.passes"


def available(points: Iterable[EntryPoint] | None = None) -> Mapping[str, type[Pass]]:
    """All passes by name, in alphabetical order.

    Args:
        points: the entry points to read; those of the installed packages where not given.

    Raises:
        PassError: for an entry point that cannot be imported or offers no passes, and for a name given twice.
    """
    return _installed() if points is None else _collect(points)


def load_own() -> None:
    """Import the library that comes with fxopt, which a directory on the path of imports may have another one of."""
    for point in entry_points(group=GROUP, name="fxopt"):
        point.load()


@functools.cache
def _installed() -> Mapping[str, type[Pass]]:
    points = entry_points(group=GROUP)
    if not points:
        raise PassError(
            f"no passes are installed: no package declares the entry-point group '{GROUP}'; "
            "install fxopt again (`pip install --force-reinstall fxopt`)"
        )
    return _collect(points)


def _collect(points: Iterable[EntryPoint]) -> Mapping[str, type[Pass]]:
    found: dict[str, type[Pass]] = {}
    origin: dict[str, str] = {}
    for point in points:
        label = _label(point)
        for pass_class in _offered(point, label):
            name = pass_class.name
            if name in found:
                raise PassError(
                    f"two passes are named '{name}': '{_path(found[name])}' from {origin[name]} and "
                    f"'{_path(pass_class)}' from {label}; rename one, or uninstall the package that you don't need"
                )
            found[name] = pass_class
            origin[name] = label
    return MappingProxyType(dict(sorted(found.items())))


def _offered(point: EntryPoint, label: str) -> tuple[type[Pass], ...]:
    try:
        module = point.load()
    except Exception as error:
        raise PassError(
            f"cannot import the passes of {label}: {type(error).__name__}: {error}; repair or uninstall that package"
        ) from error
    offered = getattr(module, "PASSES", None)
    place = f"{label}, '{point.value}'"
    if isinstance(module, ModuleType) and module.__file__:
        place += f" ({module.__file__})"
    if not isinstance(offered, (tuple, list)) or not offered:
        raise PassError(
            f"{place} offers no passes: expected a module with `PASSES = (APass, ...)`, a tuple of subclasses of "
            "fxopt.Pass"
        )
    for item in offered:
        _check(item, place)
    return tuple(offered)


def _check(item: object, place: str) -> None:
    """What every listed pass must have, said where the author of the pass will see it."""
    if not (isinstance(item, type) and issubclass(item, Pass)):
        raise PassError(f"{place}: PASSES holds {item!r}: expected a subclass of fxopt.Pass")
    path = _path(item)
    if not isinstance(getattr(item, "name", None), str) or not item.name:
        raise PassError(f"{place}: '{path}' has no name: expected `name: ClassVar[str] = \"...\"`")
    if not isinstance(getattr(item, "promise", None), Promise):
        raise PassError(f"{place}: '{path}' promises nothing: expected `promise: ClassVar[Promise] = Promise....`")
    parameters = getattr(item, "__dataclass_params__", None)
    if not dataclasses.is_dataclass(item) or parameters is None or not parameters.frozen:
        raise PassError(f"{place}: '{path}' is not a frozen dataclass: expected `@dataclass(frozen=True)`")
    if inspect.isabstract(item):
        missing = ", ".join(sorted(item.__abstractmethods__))
        raise PassError(f"{place}: '{path}' does not define {missing}")


def _label(point: EntryPoint) -> str:
    package = f" of '{point.dist.name}'" if point.dist is not None else ""
    return f"entry point '{point.name}'{package}"


def _path(item: type) -> str:
    return f"{item.__module__}.{item.__qualname__}"
