"""Record again and again, each time with what could not be recorded left whole, until a recording is complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from fxopt.capture.blame import came_from, changed_around, drew_numbers, is_within, paths_of, raised_in
from fxopt.capture.call import Call
from fxopt.capture.chance import RandomState
from fxopt.capture.fake import NEEDS_VALUES
from fxopt.capture.leaves import is_leaf
from fxopt.capture.record import Recording, record
from fxopt.capture.second_call import second_call
from fxopt.capture.state import State

Reason = tuple[str, str]
"""Why a module is opaque, and the user's line."""


@dataclass(frozen=True)
class Settled:
    """The last recording and what it left whole.

    Attributes:
        recording: complete but for modules in `opaque`; None where not even an incomplete one could be made.
        opaque: path -> (reason, location); only "" where the module itself can't be recorded.
        notes: what else to tell.
    """

    recording: Recording | None
    opaque: Mapping[str, Reason]
    notes: tuple[str, ...] = ()


@dataclass
class _Attempt:
    recording: Recording | None
    blocked: dict[str, Reason]
    notes: dict[str, None] = field(default_factory=dict)


def settle(root: nn.Module, call: Call, state: State, whole: Mapping[str, Reason], *, fake: bool = False) -> Settled:
    """Record `root` until nothing blocks any more.

    Args:
        root: is afterwards as it was before.
        call: the example.
        state: of `root`, as it was before.
        whole: modules that are to be left whole from the start.
        fake: whether tensors have no values, so that what needs them raises.

    Raises:
        Exception: what the forward of `root` raises in eager, unchanged but for a note.
    """
    opaque = dict(whole)
    while "" not in opaque:
        attempt = _attempt(root, call, state, opaque, fake)
        if not attempt.blocked:
            return Settled(attempt.recording, opaque, tuple(attempt.notes))
        if "" in attempt.blocked:
            return Settled(attempt.recording, {"": attempt.blocked[""]}, tuple(attempt.notes))
        opaque = _outermost(opaque | further(root, attempt.blocked, opaque))
    return Settled(None, {"": opaque[""]})


def hooked_backward(root: nn.Module) -> dict[str, Reason]:
    """Modules whose hooks on gradients a graph that records through them would lose."""
    return {
        path: (f"it has a hook on its gradients, which runs only where '{type(module).__name__}' is called", "")
        for path, module in root.named_modules()
        if (module._backward_hooks or module._backward_pre_hooks) and not (path and is_leaf(module))
    }


def _attempt(root: nn.Module, call: Call, state: State, opaque: Mapping[str, Reason], fake: bool) -> _Attempt:
    began = RandomState()
    try:
        recording = record(root, call.fresh(), opaque=frozenset(opaque), state=state)
        attempt = _Attempt(recording, dict(recording.blocked))
        if not fake:
            _find_what_stays(attempt, root, call, state, began, opaque)
            _find_made_unseen(attempt, root, call, state, began, opaque)
    except Exception as error:
        attempt = _Attempt(None, {})
        state.restore()
        began.restore()
        _raise_if_eager_does(root, call, fake)
        path, location = raised_in(error, root)
        needs = fake and isinstance(error, NEEDS_VALUES)
        what = "it needs values, which fake tensors don't have" if needs else "recording it failed"
        attempt.blocked[path] = (f"{what} ({type(error).__name__}: {_first_line(error)})", location)
    finally:
        state.restore()
        began.restore()
    return attempt


def _raise_if_eager_does(root: nn.Module, call: Call, fake: bool) -> None:
    try:
        call.run(root)
    except Exception as eager:
        if fake and isinstance(eager, NEEDS_VALUES):
            return
        came_from(eager, root)
        raise eager from eager.__cause__


def _find_made_unseen(
    attempt: _Attempt, root: nn.Module, call: Call, state: State, began: RandomState, opaque: Mapping[str, Reason]
) -> None:
    """Block the modules that use tensors which code outside of torch's view makes anew at each call.

    A tensor that was there before the call is a constant, and is there at a second call too.
    """
    recording = attempt.recording
    assert recording is not None
    unknown = [met for met in recording.met if met.name not in recording.fixed and not state.holds(met.tensor)]
    if not unknown or attempt.blocked:
        return
    state.restore()
    began.restore()
    again = {id(met.tensor) for met in record(root, call.fresh(), opaque=frozenset(opaque)).met}
    for met in unknown:
        if id(met.tensor) not in again:
            reason = "it uses a tensor that was made where torch does not let calls be recorded, such as an extension"
            attempt.blocked.setdefault(met.path, (reason, met.location))


def _find_what_stays(
    attempt: _Attempt, root: nn.Module, call: Call, state: State, began: RandomState, opaque: Mapping[str, Reason]
) -> None:
    """Block the modules whose calls leave something behind that the next call reads, and no graph keeps.

    What an opaque module leaves in itself is kept: its own code runs.
    """
    paths = paths_of(root)
    found: dict[str, Reason] = {}
    drew, built, changed = began.python_drew(), state.changed_tree(), state.changed()
    for module, name in built:
        _block(found, paths[id(module)], f"its forward registers '{name}', which a graph can't")
    if changed and not built:
        _compare_with_second_call(attempt, found, root, call, state, began, changed)
    if drew:
        state.restore()
        began.restore()
        fresh = call.fresh()
        for path in drew_numbers(root, fresh.args, fresh.kwargs):
            _block(found, path, "it draws from Python's or numpy's random numbers, which a graph can't")
    whole = {path for path in found if is_within(path, opaque)}
    if whole:
        state.restore()
        began.restore()
        for path in whole - set(changed_around(root, call, opaque)):
            del found[path]
    attempt.blocked = {**found, **attempt.blocked}
    for module, name in changed:
        path = paths[id(module)]
        if path not in attempt.blocked and not is_within(path, opaque) and not is_leaf(module):
            attempt.notes[
                f"'{name}', an attribute that the forward of '{path or type(root).__name__}' sets, is not kept"
            ] = None


def _compare_with_second_call(
    attempt: _Attempt,
    found: dict[str, Reason],
    root: nn.Module,
    call: Call,
    state: State,
    began: RandomState,
    changed: list[tuple[nn.Module, str]],
) -> None:
    assert attempt.recording is not None
    paths = paths_of(root)
    try:
        again, differs = second_call(root, call, attempt.recording.output, state, began)
    except Exception as error:
        for module, name in changed:
            reason = f"its second call raises {type(error).__name__}, after '{name}' changed"
            _block(found, paths[id(module)], reason)
        return
    for module, name in again:
        _block(found, paths[id(module)], f"each call changes its attribute '{name}', which a graph can't")
    for module, name in changed if differs and not (found or attempt.blocked) else ():
        _block(found, paths[id(module)], f"its second call does something else, by its attribute '{name}'")


def _block(blocked: dict[str, Reason], path: str, reason: str) -> None:
    blocked.setdefault(path, (reason, ""))


def further(root: nn.Module, blocked: Mapping[str, Reason], opaque: Mapping[str, Reason]) -> dict[str, Reason]:
    """What to leave whole now: of each blocked module, the innermost one around it that is not whole yet.

    A list of modules is never called, so that leaving it whole would change nothing. What is whole grows with
    each attempt, so that the attempts come to an end.
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    result = {}
    for path, reason in blocked.items():
        while path and (is_within(path, opaque) or isinstance(modules.get(path), (nn.ModuleList, nn.ModuleDict))):
            path = path.rpartition(".")[0]
        result[path] = reason
    return result


def _outermost(opaque: Mapping[str, Reason]) -> dict[str, Reason]:
    return {path: reason for path, reason in opaque.items() if not is_within(path, opaque.keys() - {path})}


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0][:200]
