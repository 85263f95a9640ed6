"""Python code that makes plain numbers of traced ones: `len`, `int`, `float`, most of `math`, some of torch, caches."""

from __future__ import annotations

import builtins
import contextlib
import dis
import functools
import importlib.abc
import inspect
import itertools
import linecache
import math
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.fx as fx
from torch import broadcast_shapes, nn, sym_float

from fxopt.capture.frames import is_users
from fxopt.capture.recorder import Recorder
from fxopt.capture.tensors import Origin
from fxopt.capture.traced import Traced, TracedFloat, TracedInt, concrete, plain
from fxopt.graph.effects import OF_SYMBOLS


def python_numbers(recorder: Recorder, is_recording: Callable[[], bool]) -> Iterator[tuple[Any, str, Any]]:
    """What to replace while `recorder` records, as owner, name and value."""
    original_len = builtins.len

    def length(value: Any, /) -> Any:
        if isinstance(value, torch.Tensor) and is_recording() and value.dim() > 0:
            return recorder.length(value)
        return original_len(value)

    def number(value: Any) -> Any:
        """What stands in a tensor, as `item` would read it."""
        if not isinstance(value, torch.Tensor) or not is_recording():
            return value
        with recorder.paused():
            is_read = value.numel() == 1 and value.dtype is not torch.bool
        return value.item() if is_read else value

    def whole(value: Any) -> Any:
        found = number(value)
        if isinstance(found, TracedFloat):
            return math.trunc(found)
        return found if isinstance(found, TracedInt) else int(found)

    def real(value: Any) -> Any:
        found = number(value)
        if isinstance(found, TracedInt) and found.trace is not None:
            return found.trace.arithmetic(sym_float, (found,), float(plain(found)))
        return found if isinstance(found, TracedFloat) else float(found)

    def broadcast(*shapes: Any) -> Any:
        """Torch's own is Python code that takes a traced number for one of its compiler."""
        sizes = [shape if isinstance(shape, (list, tuple)) else (shape,) for shape in shapes]
        result = broadcast_shapes(*([*map(plain, shape)] for shape in sizes))
        depends = [size.depends for shape in sizes for size in shape if isinstance(size, Traced)]
        if not depends or not is_recording():
            return result
        node = recorder.emit("call_function", broadcast_shapes, recorder.argument(shapes))
        return recorder.adopt(node, result, Origin(max(depends), max(depends), max(depends)))

    yield builtins, "len", length
    yield torch, "broadcast_shapes", broadcast
    yield torch.functional, "broadcast_shapes", broadcast
    files = list(_files(recorder.root))
    computing = {id(function): _computing(function) for function in (*_MATH, *OF_SYMBOLS)}
    for owner in (math, torch, *files, *_generated(recorder.root)):
        for name, value in list(vars(owner).items()):
            if id(value) in computing:  # the user's files may have them by name
                yield owner, name, computing[id(value)]
    for file in files:
        called = _called_only(file)
        for kind, convert in ((int, whole), (float, real)):
            if kind.__name__ in called and kind.__name__ not in vars(file):
                yield file, kind.__name__, _Converting(kind, convert)
        for owner in (file, *_classes(file)):
            for name, value in list(vars(owner).items()):
                yield from _without_cache(owner, name, value)


def _classes(file: types.ModuleType) -> list[type]:
    """Those that are defined in it."""
    return [value for value in vars(file).values() if isinstance(value, type) and value.__module__ == file.__name__]


def _without_cache(owner: Any, name: str, value: Any) -> Iterator[tuple[Any, str, Any]]:
    """What to replace where a function, or what a decorator of a library keeps of it, is cached by `functools`."""
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    if isinstance(function, functools._lru_cache_wrapper):
        computed = _computed_for_traced(function)
        yield owner, name, computed if function is value else type(value)(computed)
    for cell in (isinstance(function, types.FunctionType) and function.__closure__) or ():
        with contextlib.suppress(ValueError):  # it is empty yet
            if isinstance(cell.cell_contents, functools._lru_cache_wrapper):
                yield cell, "cell_contents", _computed_for_traced(cell.cell_contents)


def _computed_for_traced(cached: functools._lru_cache_wrapper[Any]) -> Callable[..., Any]:
    """The same function, computed anew for traced numbers: to look one up needs its value, and would be a guard."""

    def call(*given: Any, **options: Any) -> Any:
        is_traced = _holds_traced((*given, *options.values()))
        return (cached.__wrapped__ if is_traced else cached)(*given, **options)

    own = ("cache_info", "cache_clear", "cache_parameters")
    return functools.update_wrapper(call, cached, (*functools.WRAPPER_ASSIGNMENTS, *own))


def _holds_traced(value: Any) -> bool:
    return isinstance(value, Traced) or (isinstance(value, tuple) and any(map(_holds_traced, value)))


class _Converting:
    """Stands for `int` or `float` in a file that only calls it, and asks for it."""

    def __init__(self, kind: type, convert: Callable[[Any], Any]):
        self.kind = kind
        self.convert = convert

    def __call__(self, *given: Any, **options: Any) -> Any:
        return self.convert(*given) if len(given) == 1 and not options else self.kind(*given, **options)

    def __instancecheck__(self, value: Any) -> bool:
        return isinstance(value, self.kind)

    def __subclasscheck__(self, cls: type) -> bool:
        return issubclass(cls, self.kind)


_RECORDED = {math.floor, math.ceil, math.trunc, math.prod, getattr(math, "sumprod", None)}
"""Functions that call the methods of a number."""

_MATH = [each for each in vars(math).values() if isinstance(each, types.BuiltinFunctionType) and each not in _RECORDED]


def _computing(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which is recorded where it makes a number of numbers."""

    def compute(*given: Any, **options: Any) -> Any:
        trace = next((each.trace for each in given if isinstance(each, Traced)), None)
        if trace is None or options or not all(isinstance(each, (int, float)) for each in given):
            return function(*map(_read, given), **{name: _read(value) for name, value in options.items()})
        result = function(*map(plain, given))
        if isinstance(result, bool) or not isinstance(result, (int, float)):
            return function(*map(concrete, given))
        return trace.arithmetic(function, given, result)

    return compute


def _read(value: Any) -> Any:
    return [concrete(number) for number in value] if isinstance(value, (list, tuple, Iterator)) else concrete(value)


class _Names:
    """The global names of a piece of code, as attributes."""

    def __init__(self, names: dict[str, Any]):
        self.__dict__ = names


def _generated(root: nn.Module) -> Iterator[_Names]:
    """The code of graphs in a module tree, which has the functions that it calls by names of its own."""
    for module in root.modules():
        if isinstance(module, fx.GraphModule):
            yield _Names(inspect.unwrap(type(module).forward).__globals__)


def _files(root: nn.Module) -> Iterator[types.ModuleType]:
    """The user's files with the classes of a module tree, and what these import of their package or folder."""
    seen: set[str] = set()
    for cls in {type(module) for module in root.modules()}:
        own = sys.modules.get(cls.__module__)
        if own is None or own.__name__ in seen or not _is_users(own):
            continue
        seen.add(own.__name__)
        yield own
        for value in list(vars(own).values()):
            name = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            other = sys.modules.get(name) if isinstance(name, str) else None
            if other is not None and name not in seen and _is_users(other) and _are_neighbours(own, other):
                seen.add(other.__name__)
                yield other


def _is_users(file: types.ModuleType) -> bool:
    path = _path(file)
    return file.__name__ == "__main__" if path is None else is_users(path)


def _path(file: types.ModuleType) -> str | None:
    """Where it lies; None for what is typed into an interpreter or a notebook."""
    path = str(getattr(file, "__file__", "<none>"))
    return None if path.startswith("<") else path


def _are_neighbours(one: types.ModuleType, other: types.ModuleType) -> bool:
    if one.__name__.partition(".")[0] == other.__name__.partition(".")[0]:
        return True
    path = _path(one)
    return Path(str(_path(other))).is_relative_to(Path.cwd() if path is None else Path(path).parent)


def _called_only(file: types.ModuleType) -> frozenset[str]:
    """Those of `int` and `float` with which a file does no more than call them, name a type and ask `isinstance`.

    Where it hands one on, as in `dtype=int`, nothing else can be in its place.
    """
    return _only_called_in(*_typed(file)) if _path(file) is None else _only_called_in_file(file)


@functools.cache
def _only_called_in_file(file: types.ModuleType) -> frozenset[str]:
    return _only_called_in(_code(file))


def _only_called_in(*codes: types.CodeType | None) -> frozenset[str]:
    called, handed_on = set[str](), set[str]()
    for name, before, is_called in itertools.chain(*map(_uses, codes)):
        (called if is_called or _TYPE.search(before) else handed_on).add(name)
    return frozenset(called - handed_on)


def _typed(file: types.ModuleType) -> Iterator[types.CodeType]:
    """What the functions were compiled to that are typed in, methods among them."""
    for value in list(vars(file).values()):
        for each in (value, *vars(value).values()) if isinstance(value, type) else (value,):
            if isinstance(each, types.FunctionType) and each.__module__ == file.__name__:
                yield each.__code__


_TYPE = re.compile(r"\b(isinstance|issubclass|map|defaultdict)\([^=)]*$|\btype=$|\bdef .*(: |-> |\| )$")
"""What stands before a name of a type that is no argument to anything that takes only types."""


def _code(file: types.ModuleType) -> types.CodeType | None:
    """What a file was compiled to, which Python mostly keeps."""
    spec = file.__spec__  # None for a script
    try:
        if spec is not None and isinstance(spec.loader, importlib.abc.InspectLoader):
            return spec.loader.get_code(spec.name)
        return compile(Path(str(file.__file__)).read_bytes(), str(file.__file__), "exec")
    except (OSError, ImportError, SyntaxError, ValueError):
        return None


def _uses(code: types.CodeType | None) -> Iterator[tuple[str, str, bool]]:
    """Where functions read `int` and `float`: the name, what stands before it on its line, and whether to call it."""
    if code is None:
        return
    for instruction in dis.get_instructions(code) if {"int", "float"} & {*code.co_names} else ():
        place = instruction.positions
        if instruction.opname == "LOAD_GLOBAL" and instruction.argval in ("int", "float") and place is not None:
            before = linecache.getline(code.co_filename, place.lineno or 0)[: place.col_offset]
            # The lowest bit asks for what a call needs beside the function.
            yield instruction.argval, before, bool((instruction.arg or 0) & 1)
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield from _uses(part)
