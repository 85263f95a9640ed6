"""A batch norm whose class writes its steps out, in a graph for each mode, as one that is called.

    training      count += 1; F.batch_norm(x, mean, var, gamma, beta, True)     =>  bn(x)
    evaluation    F.batch_norm(x, mean, var, gamma, beta, False)                =>  bn(x)

timm's BatchNormAct2d is one; its activation, which it calls behind these, stays where it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.graph import NORM_CALL, BatchNorm, Region, rank_of
from fxopt.modules import rebuild

_RANKS: dict[type[nn.Module], tuple[int, ...]] = {
    nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)
}  # fmt: skip


@dataclass(frozen=True)
class _Call:
    """A call of `F.batch_norm` with the tensors and options of one module."""

    node: fx.Node
    region: Region
    module: BatchNorm
    path: str
    given: dict[str, Any]

    @property
    def reads(self) -> set[fx.Node]:
        """The reads of the module's tensors."""
        return {value for name, value in self.given.items() if name != "input" and isinstance(value, fx.Node)}


def as_module(node: fx.Node, region: Region) -> fx.Node | None:
    """Let a module be called in place of `node`, and in the other mode's graph; the call, or None where it can't be."""
    program = region.program
    call = _read(node, region)
    others = [one for one in program.regions if one is not region and one.module is region.module]
    if call is None or region.mode is None or not others:
        return None
    module = call.module
    kind = next((kind for kind in _RANKS if isinstance(module, kind)), None)
    twins = [twin for twin in _calls_in(others[0]) if twin.module is module]
    if kind is None or rank_of(node) not in _RANKS[kind] or len(twins) != 1 or not _is_plain(module, region):
        return None
    counted = _counted(module, region)
    calls = (call, *twins)
    reads = {read for each in calls for read in each.reads}
    if counted is None or any({*read.users} - {each.node for each in calls} for read in reads):
        return None
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if any({*program.readers(tensor)} - reads - {*counted} for tensor in held):
        return None
    program.replace_module(module, rebuild(module, kind))
    for each in calls:
        with each.region.graph.inserting_before(each.node):
            called = each.region.graph.call_module(each.path, (each.given["input"],))
        program.note(called, each.region)
        each.region.replace(each.node, called)
        for read in each.reads:
            each.region.graph.erase_node(read)
        if each is call:
            made = called
    for erased in reversed(counted):
        region.graph.erase_node(erased)
    return made


def _calls_in(region: Region) -> Iterator[_Call]:
    for node in region.graph.nodes:
        if (call := _read(node, region)) is not None:
            yield call


def _read(node: fx.Node, region: Region) -> _Call | None:
    """The call, where all that it is given is what a batch norm has, and gives itself in this mode."""
    if node.op != "call_function" or node.target is not F.batch_norm:
        return None
    given: dict[str, Any] = {**dict(zip(NORM_CALL, node.args, strict=False)), **node.kwargs}
    mean = given.get("running_mean")
    path = str(mean.target).rpartition(".")[0] if isinstance(mean, fx.Node) and mean.op == "get_attr" else ""
    module = region.module.get_submodule(path) if path else None
    if not isinstance(module, BatchNorm) or not module.track_running_stats:
        return None
    for name in NORM_CALL[1:5]:
        read, held = given.get(name), getattr(module, name)
        if held is None or read is None:
            if held is not read:
                return None
        elif not isinstance(read, fx.Node) or read.op != "get_attr" or region.attribute(read) is not held:
            return None
    options = (region.flag(given.get("training", False)), given.get("momentum", 0.1), given.get("eps", 1e-5))
    return _Call(node, region, module, path, given) if options == (region.mode, module.momentum, module.eps) else None


def _is_plain(module: BatchNorm, region: Region) -> bool:
    """Whether nothing calls it, or would if it were called."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        not region.program.sites(module)
        and not region.program.inside_opaque(module)
        and not any(getattr(module, each) for each in hooks)
    )


def _counted(module: BatchNorm, region: Region) -> tuple[fx.Node, ...] | None:
    """Where the training graph counts its batches: the read and what adds one; None where that is not all."""
    if module.num_batches_tracked is None:
        return ()
    match region.program.readers(module.num_batches_tracked):
        case [read] if len(read.users) == 1 and read.graph is region.graph:
            added = next(iter(read.users))
            is_count = added.target == "add_" and added.args == (read, 1) and not added.kwargs and not added.users
            return (read, added) if is_count else None
    return None
