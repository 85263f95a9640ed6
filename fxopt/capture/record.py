"""One recording: a module run once on example inputs, and the graph of what it did."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.utils import _pytree as pytree

from fxopt.capture.blame import is_within
from fxopt.capture.call import Call
from fxopt.capture.captured import Guard
from fxopt.capture.exporting import exporting
from fxopt.capture.interception import intercept
from fxopt.capture.leaves import is_leaf, switches_by_mode
from fxopt.capture.provenance import Depends
from fxopt.capture.recorder import Recorder
from fxopt.capture.rejoined import rejoin
from fxopt.capture.same import difference
from fxopt.capture.signature import bind, call_as_given, record_inputs
from fxopt.capture.state import State, memory_of, modes_kept
from fxopt.capture.structure import without_numbers
from fxopt.capture.tape import Unrecordable
from fxopt.capture.tensors import Met, Origin, apart
from fxopt.nested import is_shape, tensors_in


@dataclass(frozen=True)
class Recording:
    """What one run of a module left.

    Attributes:
        graph: the graph, complete only where nothing is in `blocked` and `failed` is empty.
        output: what the run returned.
        blocked: modules that did what can't be recorded: path -> (reason, location).
        guards: what was assumed.
        met: unregistered tensors that were used.
        fixed: names of those of them whose values can't depend on an input.
        asked_mode: paths of modules that read their `training` flag.
        calls: torch calls in the graph.
        notes: what else to tell.
        seconds: wall time of the forward.
    """

    graph: fx.Graph
    output: Any
    blocked: Mapping[str, tuple[str, str]]
    guards: tuple[Guard, ...]
    met: tuple[Met, ...]
    fixed: frozenset[str]
    asked_mode: frozenset[str]
    calls: int
    notes: tuple[str, ...]
    seconds: float


@dataclass
class _Run:
    """The module calls of one recording."""

    recorder: Recorder
    paths: Mapping[int, str]
    opaque: frozenset[str]
    notes: dict[str, None] = field(default_factory=dict)

    def on_module(
        self, module: nn.Module, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        path = self.paths.get(id(module))
        if not self.recorder.active:
            return call(module, *args, **kwargs)
        if path is None or path == "":
            return self._inside(module, call, path or self.recorder.path, args, kwargs)
        if path in self.opaque or is_leaf(module) or switches_by_mode(module):
            return self._whole(module, call, path, args, kwargs)
        if module._forward_hooks or module._forward_pre_hooks:
            self.notes[f"hooks of '{path}' were recorded into the graph"] = None
        return self._inside(module, call, path, args, kwargs)

    def _inside(self, module: nn.Module, call: Callable[..., Any], path: str, args: Any, kwargs: Any) -> Any:
        self.recorder.stack.append(path)
        try:
            return call(module, *args, **kwargs)
        finally:
            self.recorder.stack.pop()

    def _whole(self, module: nn.Module, call: Callable[..., Any], path: str, args: Any, kwargs: Any) -> Any:
        """A call that stays one node."""
        recorder = self.recorder
        recorder.calls += 1
        with recorder.paused():
            try:
                node_args, node_kwargs = recorder.argument(args), recorder.argument(kwargs)
            except Unrecordable as reason:
                recorder.block(f"'{path}' was given {reason}")
                return call(module, *args, **kwargs)
            origin = recorder.origin("", args, kwargs)
            if path in self.opaque or module.training:
                origin = Origin(Depends.DATA, origin.shape, Depends.DATA)
            with recorder.noting_errors(path):
                result = call(module, *without_numbers(args), **without_numbers(kwargs))
            node = recorder.emit("call_module", path, node_args, node_kwargs)
            if path in self.opaque:
                recorder.received(node, result, f"'{path}'")
                recorder.take_up_changes((args, kwargs))
                if any(isinstance(leaf, bool) for leaf in pytree.tree_leaves(result)):
                    recorder.block(f"'{path}', which is opaque, returns a flag that it may decide on")
            if getattr(module, "inplace", False) is not True:
                result = apart(result, (args, kwargs))
            return recorder.adopt(node, result, origin)


def record(
    module: nn.Module, call: Call, opaque: frozenset[str] = frozenset(), state: State | None = None
) -> Recording:
    """Run `module` on its arguments and record it; again if it must be told that it is exported.

    Args:
        module: run as it is, in its mode; its state changes as its forward changes it.
        call: its arguments, which the forward may write into.
        opaque: paths of modules to keep as one call each.
        state: of `module` as it is now, but for its mode; taken here where it is not known.
    """
    state, random = state or State(module), torch.get_rng_state()
    kept = call.fresh()
    recording = _record(module, call, opaque)
    if not recording.blocked:
        return recording
    for compiling in (False, True):
        with modes_kept(module):
            state.restore()
        torch.set_rng_state(random)
        with exporting(compiling=compiling) as answers, suppress(Exception):  # whatever expects a compiler
            exported = _record(module, kept.fresh(), opaque)
            is_better = exported.blocked.keys() < recording.blocked.keys()
            if is_better and difference(recording.output, exported.output) is None:
                reason, location = next(iter(recording.blocked.values()))
                note = f"recorded as it runs when it is exported, since otherwise {reason} ({location})"
                return replace(exported, notes=(*exported.notes, note))
        if not answers:
            break
    return recording


def _record(module: nn.Module, call: Call, opaque: frozenset[str]) -> Recording:
    paths = {id(child): path for path, child in reversed(list(module.named_modules(remove_duplicate=False)))}
    tensors = {id(t): n for n, t in reversed(list(module.named_parameters(remove_duplicate=False)))}
    tensors |= {id(t): n for n, t in reversed(list(module.named_buffers(remove_duplicate=False)))}
    recorder = Recorder(module, paths, tensors, call.static_tensors)
    bound = bind(module, call.args, call.kwargs)
    record_inputs(recorder, bound)
    buffers = _buffers(module)
    run = _Run(recorder, paths, opaque)
    began = time.perf_counter()
    with intercept(recorder, run.on_module):
        recorder.active = True
        output = call_as_given(module, bound, len(call.args))
        recorder.active = False
    seconds = time.perf_counter() - began
    reassigned = _record_reassigned(recorder, module, buffers, opaque, (output, call.args, call.kwargs))
    recorder.block_decisions_on(recorder.written_state() | reassigned)
    try:
        recorder.record_changed_objects()
        recorder.graph.output(recorder.argument(output, for_torch=False))
    except Unrecordable as reason:
        recorder.block(f"it returns or keeps {reason}", path="")
        recorder.graph.output(None)
    for gone in rejoin(recorder.graph):
        del recorder.guards[gone]
    recorder.drop_unused()
    recorder.done = True
    return Recording(
        graph=recorder.graph,
        output=_without_history(without_numbers(output), memory_of(*buffers.values())),
        blocked=recorder.blocked,
        guards=tuple(recorder.guards),
        met=tuple(recorder.met),
        fixed=frozenset(recorder.fixed),
        asked_mode=frozenset(recorder.asked_mode),
        calls=recorder.calls,
        notes=tuple(run.notes),
        seconds=seconds,
    )


def _buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_buffers(remove_duplicate=False))


def _record_reassigned(
    recorder: Recorder, module: nn.Module, before: Mapping[str, torch.Tensor], opaque: frozenset[str], left: Any
) -> set[str]:
    """A buffer that the forward replaced is written instead, so that the captured module's state moves too.

    Opaque modules replace their own. Of an old value that is among what is `left`, or in another buffer, there is a
    copy. Returns the names.
    """
    replaced: list[tuple[fx.Node, torch.Tensor, torch.Tensor]] = []
    for name, after in _buffers(module).items():
        old = before.get(name)
        if old is after:
            continue
        owner = name.rpartition(".")[0]
        if is_within(owner, opaque):
            continue
        if old is None or old.dtype != after.dtype:
            recorder.block(f"it replaces its buffer '{name}' by one of another dtype", path=owner)
            continue
        replaced.append((recorder.known(old).node, old, after))
    memory = memory_of(*(old for _, old, _ in replaced))
    kept = {id(tensor): tensor for tensor in (*tensors_in(left), *(after for _, _, after in replaced))}
    for tensor in kept.values():
        if not memory.isdisjoint(memory_of(tensor)):
            value = recorder.known(tensor)
            value.node = recorder.emit("call_method", "clone", (value.node,))
    for target, old, after in replaced:
        source = recorder.known(after).node
        if old.shape == after.shape:
            recorder.emit("call_method", "copy_", (target, source))
        else:
            recorder.emit("call_method", "set_", (target, recorder.emit("call_method", "clone", (source,))))
    return {str(target.target) for target, _, _ in replaced}


def _without_history(output: Any, written: set[int]) -> Any:
    """Outputs that don't hold on to what autograd kept of the run, which can be most of a model's memory.

    What lies in memory that later runs write is copied.
    """

    def kept(leaf: torch.Tensor) -> torch.Tensor:
        value = leaf.detach()
        return (value if written.isdisjoint(memory_of(leaf)) else value.clone()).requires_grad_(leaf.requires_grad)

    return pytree.tree_map_only(torch.Tensor, kept, output, is_leaf=is_shape)
