"""The graphs of both modes of one module, from a recording in each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.fx as fx
from torch import nn

from fxopt.capture.blame import drew_numbers, is_within, paths_of
from fxopt.capture.call import Call
from fxopt.capture.chance import RandomState
from fxopt.capture.guards import guard_mode
from fxopt.capture.modes import merge_modes
from fxopt.capture.record import Recording, record
from fxopt.capture.second_call import second_call
from fxopt.capture.state import State, modes_kept


@dataclass(frozen=True)
class TwoModes:
    """What came of recording a module in both modes.

    Attributes:
        graphs: mode -> graph, or one graph for both under the mode at hand.
        recordings: those that the graphs came from, in the order of their constants' names.
        notes: why there is no graph for one of the modes.
    """

    graphs: dict[bool, fx.Graph]
    recordings: tuple[Recording, ...]
    notes: tuple[str, ...] = ()


def record_other_mode(root: nn.Module, call: Call, first: Recording, opaque: frozenset[str], state: State) -> TwoModes:
    """Record `root` in the mode that it is not in, and merge the two recordings where they differ in no path taken.

    Leaves `root` as it was.
    """
    here = root.training
    with modes_kept(root):
        root.train(not here)
        other = _record_as_it_is(root, call, opaque, state)
    if isinstance(other, str):
        reason = f"in {'evaluation' if here else 'training'} mode {other}"
        _guard(first.graph, {"": here}, reason)
        return TwoModes({here: first.graph}, (first,), (f"captured for one mode only: {reason}",))
    recording, modes = other
    return _combine(here, first, recording, {here: _modes(root, first), not here: modes})


def _record_as_it_is(
    root: nn.Module, call: Call, opaque: frozenset[str], state: State
) -> tuple[Recording, dict[str, bool]] | str:
    """Record `root` in the mode that it is in, with the modes of what asked for them; or why no graph can be that."""
    began, training = RandomState(), root.training
    try:
        recording = record(root, call.fresh(), opaque=opaque, state=state)
        modes, paths = _modes(root, recording), paths_of(root)
        changed = [pair for pair in state.changed_tree() if not is_within(paths[id(pair[0])], opaque)]
        if not changed:
            numbers = [
                (module, name)
                for module, name in state.changed()
                if isinstance(getattr(module, name, None), (int, float)) and not is_within(paths[id(module)], opaque)
            ]
            # What is set once, such as that something has been set up, is the same for all calls after it.
            if numbers and any(second_call(root, call, recording.output, state, began)):
                changed = numbers
        if changed:
            return f"its forward changes its attribute '{changed[0][1]}'"
        if began.python_drew() and _drew_outside(root, call, state, began, opaque, training):
            return "it draws from Python's or numpy's random numbers"
        if recording.blocked:
            reason, location = next(iter(recording.blocked.values()))
            return f"{reason} ({location})"
        return recording, modes
    except Exception as error:  # whatever the user's forward raises in that mode
        return f"it raises {type(error).__name__}: {error}"
    finally:
        state.restore()
        began.restore()


def _drew_outside(
    root: nn.Module, call: Call, state: State, began: RandomState, opaque: frozenset[str], training: bool
) -> bool:
    """Whether a call of `root` draws numbers of Python's or numpy's elsewhere than in the code of opaque modules."""
    state.restore()
    began.restore()
    root.train(training)
    fresh = call.fresh()
    return not all(is_within(path, opaque) for path in drew_numbers(root, fresh.args, fresh.kwargs))


def _combine(here: bool, first: Recording, other: Recording, modes: dict[bool, dict[str, bool]]) -> TwoModes:
    evaluation, training = (other, first) if here else (first, other)
    if _same_constants(evaluation, training) and merge_modes(evaluation.graph, training.graph):
        # A part that both recordings found in one mode is not asked for it again.
        fixed = {path: mode for path, mode in modes[here].items() if modes[not here].get(path) is mode}
        _guard(evaluation.graph, fixed, "part of the module, kept in that mode by its train()")
        return TwoModes({here: evaluation.graph}, (evaluation,))
    for mode, recording in ((False, evaluation), (True, training)):
        _guard(recording.graph, modes[mode], "the two modes take different paths, and are switched for the whole only")
    return TwoModes({False: evaluation.graph, True: training.graph}, (evaluation, training))


def _modes(root: nn.Module, recording: Recording) -> dict[str, bool]:
    return {path: root.get_submodule(path).training for path in sorted(recording.asked_mode)}


def _guard(graph: fx.Graph, modes: dict[str, bool], reason: str) -> None:
    start = next((node for node in graph.nodes if node.op != "placeholder"), None)
    if start is None:
        return
    with graph.inserting_before(start):
        for path, mode in modes.items():
            # Nested names are as valid as flat ones; torch warns where it cannot see them.
            flag = graph.create_node("get_attr", f"{path}.training" if path else "training")
            graph.call_function(guard_mode, (flag, mode, f"'{path}'" if path else "the module", reason))


def _same_constants(left: Recording, right: Recording) -> bool:
    if len(left.met) != len(right.met):
        return False
    for one, other in zip(left.met, right.met, strict=True):
        if one.tensor.shape != other.tensor.shape or one.tensor.dtype != other.tensor.dtype:
            return False
        if one.tensor is not other.tensor and not torch.equal(one.tensor, other.tensor):
            return False
    return True
