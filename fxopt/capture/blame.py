"""Which module is behind something that capture did not expect: an exception, or numbers drawn by Python."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from types import FrameType
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from fxopt.capture.call import Call
from fxopt.capture.chance import RandomState
from fxopt.capture.frames import is_users
from fxopt.capture.state import State, origins
from fxopt.graph import Source

_ITSELF = "raised by the forward of"


def paths_of(root: nn.Module) -> dict[int, str]:
    """The first qualified name of each module below `root`, by identity, for the originals that one runs too."""
    paths: dict[int, str] = {}
    for path, child in root.named_modules(remove_duplicate=False):
        for part in origins(child):
            paths.setdefault(id(part), path)
    return paths


def is_within(path: str, others: Iterable[str]) -> bool:
    """Whether a module is one of the others, or lies in one."""
    return any(not other or path == other or path.startswith(f"{other}.") for other in others)


def raised_in(error: BaseException, root: nn.Module) -> tuple[str, str]:
    """The innermost module of `root` whose code was running when `error` was raised, and its line."""
    paths = paths_of(root)
    found, location = "", ""
    for frame, line in _frames(error):
        file = frame.f_code.co_filename
        if not is_users(file):
            continue
        location = str(Source(file, line))
        running = frame.f_locals.get("self")
        if isinstance(running, nn.Module):
            found = paths.get(id(running), found)
    return found, location


def came_from(error: BaseException, root: nn.Module) -> None:
    """Add a line to an error that the model's own forward raised, so that nobody looks for it in fxopt."""
    _, location = raised_in(error, root)
    where = f" at {location}" if location else ""
    error.add_note(f"{_ITSELF} '{type(root).__name__}' itself{where}, run as it is on the example inputs")


def said_of(error: BaseException) -> str | None:
    """The line that `came_from` added; None for an error that is not the model's own."""
    return next((note for note in getattr(error, "__notes__", ()) if note.startswith(_ITSELF)), None)


def advice_on(error: BaseException) -> str:
    """What to do about an error that a forward raises because it runs without gradients; "" for any other."""
    lacks = "does not require grad" in str(error)
    return "; it runs without gradients: compute them within `torch.enable_grad()`" if lacks else ""


def drew_numbers(root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
    """Run `root` and see which modules draw numbers from Python's or numpy's streams."""
    drew: dict[str, None] = {}
    paths = paths_of(root)
    stack: list[str] = [""]
    last = [RandomState()]

    def look() -> None:
        if last[0].python_drew():
            drew[stack[-1]] = None
            last[0] = RandomState()

    def enter(module: nn.Module, args: Any) -> None:
        look()
        stack.append(paths.get(id(module), stack[-1]))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        look()
        stack.pop()

    with register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True):
        root(*args, **kwargs)
    return list(drew)


def changed_around(root: nn.Module, call: Call, opaque: Iterable[str]) -> list[str]:
    """The modules in opaque ones that other code changes than that of the opaque one, in two calls of `root` in a row.

    A first call may find nothing to change, as where it sets back a state that is not there yet.
    """
    paths = paths_of(root)
    left = {id(module): State(module) for module in map(root.get_submodule, opaque)}
    changed: dict[str, None] = {}

    def look(state: State) -> None:
        for module, _ in (*state.changed(by_value=True), *state.changed_tree()):
            changed[paths[id(module)]] = None

    def enter(module: nn.Module, args: Any) -> None:
        if id(module) in left:
            look(left[id(module)])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in left:
            left[id(module)] = State(module)

    with (
        register_module_forward_pre_hook(enter),
        register_module_forward_hook(leave, always_call=True),
        suppress(Exception),  # the caller knows already whether it runs
    ):
        call.run(root)
        call.run(root)
    for state in left.values():
        look(state)
    return list(changed)


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback.tb_frame, traceback.tb_lineno
        traceback = traceback.tb_next
