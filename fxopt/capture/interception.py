"""What torch's function mode does not see: module calls, the mode flag, regions, autograd functions, arrays.

All of it is replaced for the time of one recording, on the recording thread only, and put back whatever
happens.
"""

from __future__ import annotations

import _frozen_importlib
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from fxopt.capture.constructors import constructors
from fxopt.capture.provenance import Depends
from fxopt.capture.python_numbers import python_numbers
from fxopt.capture.recorder import Recorder
from fxopt.capture.structure import Apply, without_numbers
from fxopt.capture.tensors import Origin
from fxopt.capture.vmapped import Told, record_vmap
from fxopt.graph.modes import switch_gradients

ONE_AT_A_TIME = threading.RLock()
"""Recordings in several threads would put back each other's replacements, and leave some for good."""

ModuleCall = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def intercept(recorder: Recorder, on_module: ModuleCall) -> Iterator[None]:
    """Send module calls to `on_module`, and what else torch's mode does not see to the recorder."""
    thread = threading.get_ident()

    def is_recording() -> bool:
        return recorder.active and threading.get_ident() == thread

    with ONE_AT_A_TIME, ExitStack() as stack:
        stack.enter_context(_imports(recorder, thread))
        stack.enter_context(_module_calls(on_module, thread))
        stack.enter_context(_mode_flag(recorder, is_recording))
        stack.enter_context(_autocast(recorder, is_recording))
        stack.enter_context(_gradients(recorder, is_recording))
        stack.enter_context(_autograd_functions(recorder, is_recording))
        stack.enter_context(_arrays(recorder, is_recording))
        stack.enter_context(_vmap(recorder, is_recording))
        for owner, name, value in (*constructors(recorder, is_recording), *python_numbers(recorder, is_recording)):
            stack.enter_context(replaced(owner, name, value))
        stack.enter_context(recorder)
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for a while, though not for modules that are imported meanwhile."""
    replacement = _Replacement(owner, name, value)
    replacement.put()
    _REPLACEMENTS.append(replacement)
    try:
        yield
    finally:
        _REPLACEMENTS.pop()
        replacement.take_back()


class _Replacement:
    """An attribute that is another now."""

    def __init__(self, owner: Any, name: str, value: Any):
        self._owner, self._name, self._value = owner, name, value

    def put(self) -> None:
        is_cell = isinstance(self._owner, types.CellType)  # what a closure holds, without a namespace
        held = {self._name: self._owner.cell_contents} if is_cell else vars(self._owner)
        self._had = self._name in held
        self._original = held.get(self._name)
        setattr(self._owner, self._name, self._value)

    def take_back(self) -> None:
        if self._had:
            setattr(self._owner, self._name, self._original)
        else:
            delattr(self._owner, self._name)


_REPLACEMENTS: list[_Replacement] = []
"""Those that are in place, in order."""


@contextmanager
def _imports(recorder: Recorder, thread: int) -> Iterator[None]:
    """Load modules that a forward is the first to import as they always are: torch's compiler, say, for a checkpoint.

    What a module computes as it is loaded is there at the next call, and torch._dynamo looks at torch's functions.
    """
    original = _frozen_importlib._find_and_load  # type: ignore[attr-defined]

    def load(*name: Any) -> Any:
        if threading.get_ident() != thread:
            return original(*name)
        standing = _REPLACEMENTS.copy()
        for replacement in reversed(standing):
            replacement.take_back()
        try:
            with recorder.paused() if recorder.active else nullcontext():
                return original(*name)
        finally:
            for replacement in standing:
                replacement.put()

    with replaced(_frozen_importlib, "_find_and_load", load):
        yield


@contextmanager
def _module_calls(on_module: ModuleCall, thread: int) -> Iterator[None]:
    original = nn.Module.__call__

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread:
            return original(self, *args, **kwargs)
        return on_module(self, original, args, kwargs)

    with replaced(nn.Module, "__call__", call):
        yield


@contextmanager
def _mode_flag(recorder: Recorder, is_recording: Callable[[], bool]) -> Iterator[None]:
    """A property on the class is asked before the attribute of the instance."""

    def get(self: nn.Module) -> bool:
        if is_recording():
            recorder.asked_mode.add(recorder.path)
        try:
            value: bool = self.__dict__["training"]
        except KeyError:
            raise AttributeError("training") from None
        return value

    def set_(self: nn.Module, value: bool) -> None:
        self.__dict__["training"] = value

    with replaced(nn.Module, "training", property(get, set_)):
        yield


@contextmanager
def _autocast(recorder: Recorder, is_recording: Callable[[], bool]) -> Iterator[None]:
    """An autocast region becomes a pair of calls, as torch.fx itself records one; such a pair becomes one again."""
    modes: Any = torch.amp.autocast_mode
    cls = modes.autocast
    enter, leave = cls.__enter__, cls.__exit__
    begin, end = modes._enter_autocast, modes._exit_autocast
    nodes: dict[int, Any] = {}

    def on_enter(self: Any) -> Any:
        if is_recording():
            settings = (self.device, self.fast_dtype, self._enabled, self._cache_enabled)
            nodes[id(self)] = recorder.emit("call_function", begin, settings)
        return enter(self)

    def on_exit(self: Any, *error: Any) -> Any:
        node = nodes.pop(id(self), None)
        if node is not None:
            recorder.emit("call_function", end, (node,))
        return leave(self, *error)

    # torch's own ask the recorder, as any function does, and would begin the region where it does not look.
    def on_begin(*settings: Any) -> Any:
        return modes._UnmanagedAutocast(*settings).__enter__()

    def on_end(region: Any) -> None:
        region.__exit__(None, None, None)

    with ExitStack() as stack:
        for owner, name, value in (
            (cls, "__enter__", on_enter),
            (cls, "__exit__", on_exit),
            (modes, "_enter_autocast", on_begin),
            (modes, "_exit_autocast", on_end),
        ):
            stack.enter_context(replaced(owner, name, value))
        yield


@contextmanager
def _gradients(recorder: Recorder, is_recording: Callable[[], bool]) -> Iterator[None]:
    """A region with or without gradients ends in the mode that its caller is in, not in that of the recording."""
    before: dict[int, fx.Node] = {}

    def begins(original: Callable[..., Any]) -> Callable[..., Any]:
        def begin(self: Any, *args: Any, **options: Any) -> Any:
            if not is_recording():
                return original(self, *args, **options)
            with recorder.paused():
                result = original(self, *args, **options)
            before[id(self)] = recorder.emit("call_function", switch_gradients, (torch.is_grad_enabled(),))
            return result

        return begin

    def ends(original: Callable[..., Any]) -> Callable[..., Any]:
        def end(self: Any, *args: Any) -> Any:
            if not is_recording() or id(self) not in before:
                return original(self, *args)
            recorder.emit("call_function", switch_gradients, (before[id(self)],))
            with recorder.paused():
                return original(self, *args)

        return end

    inference_mode = torch._C._InferenceMode

    def inference(enabled: bool) -> Any:
        """A region without gradients: what is made in inference mode itself can't be followed, nor used elsewhere."""
        return (torch.no_grad if enabled else torch.enable_grad)() if is_recording() else inference_mode(enabled)

    with ExitStack() as stack:
        # `set_grad_enabled` begins where it is made, and ends there too where it is made to decorate a function.
        places = {torch.no_grad: "__enter__", torch.enable_grad: "__enter__", torch.set_grad_enabled: "__init__"}
        for cls, beginning in places.items():
            stack.enter_context(replaced(cls, beginning, begins(vars(cls)[beginning])))
            stack.enter_context(replaced(cls, "__exit__", ends(vars(cls)["__exit__"])))
        stack.enter_context(replaced(torch.set_grad_enabled, "__call__", ends(torch.set_grad_enabled.__call__)))
        stack.enter_context(replaced(torch._C, "_InferenceMode", inference))
        yield


@contextmanager
def _autograd_functions(recorder: Recorder, is_recording: Callable[[], bool]) -> Iterator[None]:
    """A custom autograd function stays one call, so that its own backward is used."""
    original = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not is_recording():
            return original(cls, *args, **kwargs)
        recorder.calls += 1
        with recorder.paused():
            result = original(cls, *without_numbers(args), **without_numbers(kwargs))
        recorder.active = False
        try:
            node = recorder.emit("call_function", Apply(cls), recorder.argument(args), recorder.argument(kwargs))
            return recorder.adopt(node, result, Origin(Depends.DATA, Depends.SHAPE, Depends.DATA))
        except Exception as reason:
            recorder.block(f"the autograd function '{cls.__name__}' was given {reason}")
            return result
        finally:
            recorder.active = True

    with replaced(torch.autograd.Function, "apply", classmethod(apply)):
        yield


@contextmanager
def _vmap(recorder: Recorder, is_recording: Callable[[], bool]) -> Iterator[None]:
    """A mapped function becomes a graph of its own, called once; one that is mapped in chunks can't."""
    original: Callable[..., Any] = torch._functorch.apis.vmap_impl  # type: ignore[attr-defined]

    def vmap(
        function: Any, in_dims: Any, out_dims: Any, randomness: str, chunk_size: int | None, *args: Any, **kwargs: Any
    ) -> Any:
        if not is_recording():
            return original(function, in_dims, out_dims, randomness, chunk_size, *args, **kwargs)
        if chunk_size is not None:
            recorder.block("it runs under a vmap in chunks")
            with recorder.paused():
                given = without_numbers(args), without_numbers(kwargs)
                return original(function, in_dims, out_dims, randomness, chunk_size, *given[0], **given[1])
        return record_vmap(recorder, original, function, Told(in_dims, out_dims, randomness), args, kwargs)

    with replaced(torch._functorch.apis, "vmap_impl", vmap):
        yield


@contextmanager
def _arrays(recorder: Recorder, is_recording: Callable[[], bool]) -> Iterator[None]:
    """An array is a constant: to make one of a tensor is guarded or refused already."""
    original = torch.from_numpy

    def from_numpy(array: Any) -> torch.Tensor:
        tensor = original(array)
        if is_recording():
            with recorder.paused():
                recorder.take_as_fixed(tensor)
        return tensor

    with replaced(torch, "from_numpy", from_numpy):
        yield
