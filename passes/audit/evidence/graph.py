"""What the captured graph shows that the calls of one run do not: what is for nothing, and what was assumed.

A run tells which calls were made, and with which tensors. Only the graph tells which of them reach an output, in
spite of aliases and writes in place; which part of it holds for this input alone; and what can't be in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.fx as fx
from torch.nn.modules.dropout import _DropoutNd

import fxopt
from fxopt.capture.guards import guard
from fxopt.findings import Place, Subject
from fxopt.graph import Effects, Modes, Program, Region, eliminate_dead
from passes.audit.evidence.code import is_installed
from passes.audit.evidence.driver import copied
from passes.audit.evidence.places import line_of

_CALLS = ("call_module", "call_function", "call_method")


@dataclass(frozen=True)
class Spot:
    """Something at a line.

    Attributes:
        what: a name, or a reason.
        place: the user's line; None where there is none, as in an installed package.
        module: qualified name.
        earlier: another line that matters.
    """

    what: str
    place: Place | None
    module: str
    earlier: Place | None = None


@dataclass(frozen=True)
class Graph:
    """What was seen.

    Attributes:
        idle: calls whose results reach no output; of a chain of them, the last.
        repeated: calls that do once more what an earlier one did; of a chain of them, the last.
        guards: decisions on the shapes and the plain arguments of the call.
        opaque: parts that can't be in a graph, with the reason; `place` has the name of the file only.
    """

    idle: tuple[Spot, ...] = ()
    repeated: tuple[Spot, ...] = ()
    guards: tuple[Spot, ...] = ()
    opaque: tuple[Spot, ...] = ()


def look_at_graph(subject: Subject) -> Graph:
    """Capture in evaluation, and look at each graph.

    Raises:
        CaptureError: the inputs can't be captured.
    """
    assert subject.inputs is not None
    captured = fxopt.capture(copied(subject, training=False), subject.inputs, check=False)
    idle: list[Spot] = []
    repeated: list[Spot] = []
    guards: list[Spot] = []
    for region in Program(captured.module).regions:
        if region.mode is True:
            continue
        guards += [_spot(node, region, str(node.args[4])) for node in region.graph.nodes if _is_decision(node)]
        idle += _idle(region)
        repeated += _repeated(region)
    opaque = [_opaque(part.path, part.reason, part.location) for part in captured.opaque]
    return Graph(tuple(idle), tuple(repeated), tuple(guards), tuple(opaque))


def _is_decision(node: fx.Node) -> bool:
    """Whether the user decided something there; how many dimensions `squeeze` leaves is no decision."""
    return node.target is guard and not (isinstance(node.args[0], fx.Node) and node.args[0].target == "dim")


def _idle(region: Region) -> list[Spot]:
    effects = Effects(region)
    ends = [node for node in region.graph.nodes if not node.users and _computes(node, effects)]
    last = {node: _spot(node, region) for node in ends}
    return [last[node] for node in eliminate_dead(region) if node in last]


def _repeated(region: Region) -> list[Spot]:
    effects = Effects(region)
    written = effects.written()
    first: dict[object, fx.Node] = {}
    same: dict[fx.Node, fx.Node] = {}
    modes = Modes()
    for node in region.graph.nodes:
        mode = modes.of(node)  # equal calls with and without gradients are no repetition
        random = effects.is_random(node) or _drops(node, region)
        quiet = effects.is_known(node) and not random and not effects.keeps_state(node)
        if quiet and node not in written and written.isdisjoint(node.all_input_nodes):
            key = (mode, node.op, node.target, _frozen(node.args, same), _frozen(node.kwargs, same))
            earlier = first.setdefault(key, node)
            if earlier is not node:
                same[node] = earlier
    chains = [node for node in same if _computes(node, effects) and not any(user in same for user in node.users)]
    return [_spot(node, region, earlier=_spot(same[node], region).place) for node in chains]


def _drops(node: fx.Node, region: Region) -> bool:
    """Whether a call is random in training, though it is not in evaluation."""
    if node.op == "call_module":
        return isinstance(region.submodule(node), _DropoutNd)
    return "dropout" in getattr(node.target, "__name__", "")


def _frozen(value: Any, same: dict[fx.Node, fx.Node]) -> object:
    """`value` with equal nodes as one, in a form that can be compared."""
    if isinstance(value, fx.Node):
        return same.get(value, value)
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *(_frozen(item, same) for item in value))
    if isinstance(value, dict):
        return tuple((key, _frozen(item, same)) for key, item in value.items())
    if isinstance(value, slice):
        return ("slice", *(_frozen(item, same) for item in (value.start, value.stop, value.step)))
    return (type(value).__name__, repr(value))


def _computes(node: fx.Node, effects: Effects) -> bool:
    """Whether a call makes or writes numbers, and is no mere view of some."""
    if node.op not in _CALLS or "tensor_meta" not in node.meta:
        return False
    return node.op == "call_module" or bool(effects.writes(node)) or not effects.may_alias(node)


def _spot(node: fx.Node, region: Region, what: str = "", earlier: Place | None = None) -> Spot:
    source = node.meta.get("source")
    # What a library decides, or computes for nothing, is not the user's to change.
    place = None if source is None or is_installed(source.file) else line_of(source.file, source.line)
    target = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
    inside = ".".join(filter(None, [region.path, str(node.meta.get("module_path", ""))]))
    return Spot(what or target, place, inside, earlier)


def _opaque(path: str, reason: str, location: str) -> Spot:
    file, _, line = location.rpartition(":")
    return Spot(reason, Place(file, int(line)) if line.isdigit() else None, path)
