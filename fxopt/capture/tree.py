"""A module tree captured: the root as a graph or as an opaque shell, and what opaque code calls likewise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fxopt.capture.below import calls_from, put, put_graphs_below, put_what_holds, with_unchosen
from fxopt.capture.blame import came_from, changed_around, is_within, paths_of
from fxopt.capture.call import Call
from fxopt.capture.captured import Constant, Opaque
from fxopt.capture.chance import RandomState, random_state_kept
from fxopt.capture.found import Found
from fxopt.capture.leaves import is_leaf
from fxopt.capture.record import Recording
from fxopt.capture.replay import replay
from fxopt.capture.settle import Reason, Settled, hooked_backward, settle
from fxopt.capture.shell import shell_module
from fxopt.capture.state import State, modes_kept
from fxopt.capture.two_modes import TwoModes, record_other_mode
from fxopt.capture.unheard import warn_of_hooks
from fxopt.graph import GraphModule

_OVERRIDDEN = ("train", "_save_to_state_dict", "_load_from_state_dict", "get_extra_state", "set_extra_state")


@dataclass(frozen=True)
class Builder:
    """How to capture.

    Attributes:
        check: whether to run each result on its example and compare.
        fake: whether tensors have no values.
    """

    check: bool = True
    fake: bool = False

    def build(
        self, root: nn.Module, call: Call, path: str, whole: Mapping[str, Reason] | None = None
    ) -> tuple[GraphModule, Found]:
        """Capture `root`, whose tree the result takes over.

        Args:
            root: the module; its state is afterwards as it was.
            call: an example call.
            path: its qualified name in what is captured.
            whole: modules to keep whole from the start, with reasons; {"": ...} for `root` itself.

        Raises:
            Exception: what the forward of `root` raises in eager, unchanged but for a note.
        """
        found = Found()
        state = State(root)
        settled = settle(root, call, state, whole or hooked_backward(root), fake=self.fake)
        islands: frozenset[str] = frozenset()
        two: TwoModes | None = None
        if "" not in settled.opaque:
            settled, two, islands = self._two_modes(root, call, state, settled)
        found.note(*settled.notes)
        if two is None:
            module, inside = shell_module(root, call.args, call.kwargs), frozenset({""})
        else:
            module, inside = self._graph_module(root, two, path, found), frozenset(settled.opaque) - islands
        for name, (reason, location) in settled.opaque.items():
            if name not in islands:
                found.opaque.append(Opaque(_join(path, name), reason, location))
        replaced = self._below(module, root, call, path, inside, islands, found, state)
        problem = self._problem(module, root, call, settled, replaced, found, path)
        if problem is not None:
            return self.build(root, call, path, {"": (f"as a graph {problem}", "")})
        return module, found

    def materialize(self, root: nn.Module, call: Call) -> tuple[str, ...]:
        """Give lazy parameters their shapes, by one forward, and say so."""
        lazy = [name for name, parameter in root.named_parameters() if is_lazy(parameter)]
        if not lazy:
            return ()
        with random_state_kept(), modes_kept(root), torch.no_grad():
            root.eval()
            try:
                call.run(root)
            except Exception as error:
                came_from(error, root)
                raise
        return (f"lazy parameters got the shapes that the example asks for: {', '.join(lazy)}",)

    def _two_modes(
        self, root: nn.Module, call: Call, state: State, settled: Settled
    ) -> tuple[Settled, TwoModes | None, frozenset[str]]:
        """The graphs of both modes; where parts are in another mode than `root`, they may become graphs apart."""
        recording = settled.recording
        assert recording is not None
        opaque = frozenset(settled.opaque)
        if not recording.asked_mode:
            return settled, TwoModes({root.training: recording.graph}, (recording,)), frozenset()
        apart = {name for name in recording.asked_mode if root.get_submodule(name).training is not root.training}
        if not apart:
            return settled, record_other_mode(root, call, recording, opaque, state), frozenset()
        with modes_kept(root):
            root.train(root.training)
            uniform = settle(root, call, State(root), settled.opaque, fake=self.fake)
            if "" not in uniform.opaque and uniform.recording is not None:
                merged = record_other_mode(root, call, uniform.recording, frozenset(uniform.opaque), State(root))
                if len(merged.graphs) == 1 and not merged.notes:
                    return uniform, merged, frozenset()
        whole = {**settled.opaque, **dict.fromkeys(apart, ("it is in another mode than what calls it", ""))}
        settled = settle(root, call, state, whole, fake=self.fake)
        if "" in settled.opaque or settled.recording is None:
            return settled, None, frozenset()
        islands = frozenset(apart & settled.opaque.keys())
        opaque = frozenset(settled.opaque)
        return settled, record_other_mode(root, call, settled.recording, opaque, state), islands

    def _graph_module(self, root: nn.Module, two: TwoModes, path: str, found: Found) -> GraphModule:
        for recording in two.recordings:
            self._register_constants(root, recording, path, found)
            found.guards |= dict.fromkeys(recording.guards)
            found.note(*recording.notes)
        found.note(*two.notes)
        first = two.recordings[0]
        found.calls += first.calls
        found.forward_seconds = first.seconds
        warn_of_hooks(root, two.graphs.values(), path)
        origin = root if path or _overrides(root) else None
        return GraphModule(root, two.graphs, type(root).__name__, origin)

    def _register_constants(self, root: nn.Module, recording: Recording, path: str, found: Found) -> None:
        for met in recording.met:
            name, count = met.name, 0
            while hasattr(root, name):
                count += 1
                name = f"{met.name}_{count}"
            for node in recording.graph.nodes if name != met.name else ():
                if node.op == "get_attr" and node.target == met.name:
                    node.target = name
            root.register_buffer(name, _constant(met.tensor), persistent=False)
            shape = "x".join(map(str, met.tensor.shape)) or "scalar"
            dtype = str(met.tensor.dtype).removeprefix("torch.")
            found.constants.append(Constant(_join(path, name), f"{shape} {dtype}", met.location))

    def _below(
        self,
        module: GraphModule,
        root: nn.Module,
        call: Call,
        path: str,
        inside: frozenset[str],
        islands: frozenset[str],
        found: Found,
        state: State,
    ) -> dict[str, nn.Module]:
        if not inside and not islands:
            return {}
        began = RandomState()
        seen = calls_from(root, call, inside, islands)
        written = {paths_of(root)[id(part)] for part, _ in (*state.changed(), *state.changed_tree())}
        state.restore()
        began.restore()
        found.hidden_calls += seen.hidden_calls
        kept = {name for name in seen.calls if any(is_within(part, [name]) for part in written)}
        if kept:
            around = changed_around(root, call, kept)
            kept = {name for name in kept if any(is_within(part, [name]) for part in around)}
            state.restore()
            began.restore()

        def capture(child: nn.Module, example: Call, name: str) -> GraphModule | None:
            if name in kept:
                found.note(f"'{_join(path, name)}' is not captured: the code around it sets its attributes")
                return None
            if _hands_on(child):
                found.note(f"'{_join(path, name)}' is not captured: the code around it may read what its hooks leave")
                return None
            try:
                graph_module, below = self.build(child, example, _join(path, name))
            except Exception as error:  # a module that this run did not call may take other inputs
                found.note(f"'{_join(path, name)}' is not captured: {type(error).__name__}: {error}")
                return None
            found.add(below)
            return graph_module

        replaced = put_graphs_below(module, with_unchosen(root, seen.calls, inside), islands, capture)
        state.restore_attributes()  # of `root`, where hooks on what it calls leave something
        return replaced

    def _problem(
        self,
        module: GraphModule,
        root: nn.Module,
        call: Call,
        settled: Settled,
        replaced: Mapping[str, nn.Module],
        found: Found,
        path: str,
    ) -> str | None:
        """Why the result can't stay, if it can't. Graphs below that make the difference are taken out."""
        if not self.check or self.fake or settled.recording is None:
            return None
        expected = settled.recording.output
        problem = replay(module, call, expected)
        if problem is None:
            return None
        graphs = {name: module.get_submodule(name) for name in replaced}
        put(module, replaced)
        if replay(root, call, expected) is not None:
            # It gives something else at each run by itself.
            put(module, graphs)
            found.note(f"'{path or type(root).__name__}' gives other outputs each time it is run: {problem}")
            return None
        if replaced and replay(module, call, expected) is None:
            out = put_what_holds(module, graphs, lambda: replay(module, call, expected) is None)
            left = ", ".join(f"'{_join(path, name)}'" for name in out)
            found.note(f"what '{path or type(root).__name__}' calls is a graph but for {left}: as one, {problem}")
            return None
        return None if "" in settled.opaque else problem


def _hands_on(module: nn.Module) -> bool:
    """Whether hooks of the user's may leave something outside of `module`, which its graph would not."""
    parts = [part for part in module.modules() if part is module or not is_leaf(part)]
    hooks = [hook for part in parts for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())]
    return any(not type(hook).__module__.startswith("torch.") for hook in hooks)


def _overrides(module: nn.Module) -> bool:
    return any(getattr(type(module), name, None) is not getattr(nn.Module, name) for name in _OVERRIDDEN)


def _constant(tensor: torch.Tensor) -> Any:
    if isinstance(tensor, torch._subclasses.FakeTensor):
        return torch.empty_like(tensor, device="meta")
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
