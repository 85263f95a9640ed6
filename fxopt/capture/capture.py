"""Capture: record a module until all of it is either in a graph or known to be opaque, then check the result."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from fxopt.capture.captured import Captured, Constant, Coverage, Guard, Opaque
from fxopt.capture.independent import independent_copy
from fxopt.capture.leaves import is_leaf
from fxopt.capture.modes import merge_modes
from fxopt.capture.record import Recording, record
from fxopt.capture.shell import shell_module
from fxopt.capture.state import State, random_state_kept
from fxopt.errors import CaptureError
from fxopt.graph import GraphModule
from fxopt.graph.effects import eliminate_dead
from fxopt.inputs import Inputs


def capture(module: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Captured:
    """Capture `module` as a graph by running it once on example inputs.

    Whatever runs in eager is captured. A part whose Python code decides on values of the inputs stays opaque,
    as small as possible, and its children are captured as graphs of their own. The module itself, its mode
    and the random state are as before; the result shares nothing with it that is ever written.

    Args:
        module: any module, in the mode that is to be captured first; the other mode comes along.
        args: positional arguments of an example call; a single tensor stands for itself.
        kwargs: keyword arguments of it.

    Raises:
        CaptureError: the arguments don't fit its signature, or the module can't be run.
    """
    began = time.perf_counter()
    inputs = Inputs.of(args) if not isinstance(args, tuple) else Inputs(args)
    inputs = Inputs(inputs.args, {**inputs.kwargs, **(kwargs or {})})
    duplicate = independent_copy(module)
    found = _Found()
    with random_state_kept():
        graph_module = _capture_tree(duplicate, inputs.args, inputs.kwargs, "", found)
    return Captured(
        module=graph_module,
        inputs=inputs,
        coverage=_coverage(graph_module, inputs, found),
        opaque=tuple(found.opaque),
        guards=tuple(found.guards),
        constants=tuple(found.constants),
        notes=tuple(found.notes),
        seconds=time.perf_counter() - began,
        forward_seconds=found.forward_seconds,
    )


@dataclass
class _Found:
    """What capture learns on its way through the tree."""

    opaque: list[Opaque] = field(default_factory=list)
    guards: dict[Guard, None] = field(default_factory=dict)
    constants: list[Constant] = field(default_factory=list)
    notes: dict[str, None] = field(default_factory=dict)
    calls: int = 0
    hidden_calls: int = 0
    forward_seconds: float = 0.0


def _capture_tree(
    root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], path: str, found: _Found
) -> GraphModule:
    state = State(root)
    recording, opaque = _record_until_settled(root, args, kwargs, state)
    found.forward_seconds = found.forward_seconds or recording.seconds
    examples = dict(recording.examples)
    if "" in opaque:
        examples = _examples_of_root(root, args, kwargs, state)
        graph_module = shell_module(root, args, kwargs)
        found.hidden_calls += recording.calls
    else:
        graph_module = _graph_module(root, args, kwargs, recording, frozenset(opaque), state, found)
        found.calls += recording.calls
        found.hidden_calls += recording.hidden_calls
        found.guards |= dict.fromkeys(recording.guards)
    found.notes |= dict.fromkeys(recording.notes)
    for name, (reason, location) in opaque.items():
        found.opaque.append(Opaque(_join(path, name), reason, location))
    called = {
        str(node.target) for graph in graph_module.graphs.values() for node in graph.nodes if node.op == "call_module"
    }
    for name, (child_args, child_kwargs) in _with_siblings(root, examples).items():
        _replace_child(graph_module, name, child_args, child_kwargs, called, path, found)
    return graph_module


def _record_until_settled(
    root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], state: State
) -> tuple[Recording, dict[str, tuple[str, str]]]:
    """Record again and again, each time with what could not be recorded left whole."""
    opaque: dict[str, tuple[str, str]] = {}
    while True:
        try:
            recording = record(root, *_fresh(args, kwargs), opaque=frozenset(opaque))
        finally:
            numbers = state.changed_numbers()
            state.restore()
        blocked = dict(recording.blocked)
        for module, name in numbers:
            owner = next(path for path, child in root.named_modules() if child is module)
            if owner not in opaque:
                blocked.setdefault(owner, (f"its forward changes its attribute '{name}', which a graph can't", ""))
        if not blocked or "" in opaque:
            return recording, opaque
        if "" in blocked:
            return recording, {"": blocked[""]}
        opaque |= blocked
        opaque = {name: reason for name, reason in opaque.items() if not _inside_another(name, opaque)}


def _inside_another(name: str, opaque: Mapping[str, Any]) -> bool:
    return any(name != other and name.startswith(f"{other}.") for other in opaque)


def _graph_module(
    root: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    recording: Recording,
    opaque: frozenset[str],
    state: State,
    found: _Found,
) -> GraphModule:
    graphs = {root.training: recording.graph}
    recordings = [recording]
    if recording.asked_mode:
        other = _other_mode(root, args, kwargs, opaque, state, found)
        if other is not None:
            evaluation, training = (other, recording) if root.training else (recording, other)
            if merge_modes(evaluation.graph, training.graph):
                graphs = {root.training: evaluation.graph}
                recordings = [evaluation]
            else:
                graphs = {False: evaluation.graph, True: training.graph}
                recordings = [evaluation, training]
    state.restore()
    for index, each in enumerate(recordings):
        _register_constants(root, each, index, found)
    graph_module = GraphModule(root, graphs, type(root).__name__)
    return graph_module


def _other_mode(
    root: nn.Module, args: Any, kwargs: Any, opaque: frozenset[str], state: State, found: _Found
) -> Recording | None:
    modes = [(child, child.training) for child in root.modules()]
    root.train(not root.training)
    try:
        recording = record(root, *_fresh(args, kwargs), opaque=opaque)
    except Exception as error:  # whatever the user's forward raises in that mode
        mode = "training" if root.training else "evaluation"
        found.notes[f"captured for one mode only: in {mode} mode the module raises {type(error).__name__}: {error}"] = (
            None
        )
        return None
    finally:
        state.restore()
        for child, mode_before in modes:
            child.training = mode_before
    if recording.blocked:
        reason, location = next(iter(recording.blocked.values()))
        found.notes[f"captured for one mode only: in the other one {reason} ({location})"] = None
        return None
    return recording


def _register_constants(root: nn.Module, recording: Recording, index: int, found: _Found) -> None:
    for met in recording.met:
        name = met.name if index == 0 else f"{met.name}_training"
        if index:
            for node in recording.graph.nodes:
                if node.op == "get_attr" and node.target == met.name:
                    node.target = name
        root.register_buffer(name, met.tensor.detach(), persistent=False)
        shape = "x".join(map(str, met.tensor.shape)) or "scalar"
        dtype = str(met.tensor.dtype).removeprefix("torch.")
        found.constants.append(Constant(name, f"{shape} {dtype}", met.location))


def _examples_of_root(root: nn.Module, args: Any, kwargs: Any, state: State) -> dict[str, Any]:
    """What an opaque root gives to its children, seen by running it as an opaque child of another module."""
    wrapper = _Wrapper(root)
    recording = record(wrapper, *_fresh(args, kwargs), opaque=frozenset({"wrapped"}))
    state.restore()
    return {name.removeprefix("wrapped."): example for name, example in recording.examples.items()}


class _Wrapper(nn.Module):
    def __init__(self, wrapped: nn.Module):
        super().__init__()
        self.wrapped = wrapped
        self.training = wrapped.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped(*args, **kwargs)


def _with_siblings(root: nn.Module, examples: Mapping[str, Any]) -> dict[str, Any]:
    """Examples for modules that this run did not call: those of a sibling of the same class and shapes.

    The experts that a router did not choose this time take what the chosen one took.
    """
    result = dict(examples)
    for name, example in examples.items():
        owner, _, _ = name.rpartition(".")
        twin = root.get_submodule(name)
        for child_name, child in root.get_submodule(owner).named_children():
            sibling = f"{owner}.{child_name}" if owner else child_name
            if sibling not in result and type(child) is type(twin) and _shapes(child) == _shapes(twin):
                result[sibling] = example
    return result


def _shapes(module: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, tensor.shape) for name, tensor in module.state_dict().items()]


def _replace_child(
    parent: GraphModule, name: str, args: Any, kwargs: Any, called: set[str], path: str, found: _Found
) -> None:
    """Put a graph in the place of a module that an opaque one calls."""
    child = parent.get_submodule(name)
    if name in called or isinstance(child, GraphModule) or (is_leaf(child) and not _has_functional_form(child)):
        return
    if sum(module is child for _, module in parent.named_modules(remove_duplicate=False)) > 1:
        return
    graph_module = _capture_tree(child, args, kwargs, _join(path, name), found)
    for key, value in child.__dict__.items():
        # The opaque code may still read `in_features` and the like.
        if not key.startswith("_") and key not in graph_module.__dict__ and isinstance(value, (int, float, str, tuple)):
            graph_module.__dict__[key] = value
    parent.set_submodule(name, graph_module)


def _has_functional_form(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd))


def _coverage(module: GraphModule, inputs: Inputs, found: _Found) -> Coverage:
    if not found.opaque:
        return Coverage(1.0, 1.0, 1.0)
    from fxopt.capture.coverage import coverage

    return coverage(module, inputs, found.calls, found.hidden_calls)


def _fresh(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Inputs that a forward may write into."""
    memo: dict[int, Any] = {}
    try:
        return copy.deepcopy((args, dict(kwargs)), memo)  # type: ignore[return-value]
    except RuntimeError:  # tensors with a history can't be deep-copied
        detach = torch.utils._pytree.tree_map_only
        return detach(torch.Tensor, lambda t: t.detach().clone(), (args, dict(kwargs)))  # type: ignore[no-any-return]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
