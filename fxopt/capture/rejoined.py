"""Parts that a tensor is taken into and that are only joined again: the tensor itself, however many they are.

parts = list(x); torch.cat(parts)   =>   x.flatten(0, 1).clone()
"""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

from fxopt.capture.captured import Guard
from fxopt.capture.guards import guard_parts
from fxopt.graph import inherit

_JOINS = (torch.cat, torch.concat, torch.concatenate, torch.stack)


def rejoin(graph: fx.Graph) -> list[Guard]:
    """Join what is taken apart, and return the guards on numbers of parts that are gone with it."""
    gone = []
    for node in list(graph.nodes):
        taken = _taken_apart(node)
        if taken is None:
            continue
        with graph.inserting_before(node):
            joined = taken.args[0]
            if node.target is not torch.stack:
                joined = inherit(graph.call_method("flatten", (joined, 0, 1)), node)
            joined = inherit(graph.call_method("clone", (joined,)), node)
        node.replace_all_uses_with(joined)
        graph.erase_node(node)
        if not any(part.users for part in taken.users):
            for user in list(taken.users):
                if user.target is guard_parts:
                    gone.append(Guard(*map(str, user.args[2:])))
                graph.erase_node(user)
            graph.erase_node(taken)
    return gone


def _taken_apart(node: fx.Node) -> fx.Node | None:
    """What takes a tensor into the parts along its first dimension that `node` joins along theirs, all in order."""
    if (
        node.target not in _JOINS
        or len(node.args) + len(node.kwargs) > 2
        or not isinstance(node.args[0], (list, tuple))
    ):
        return None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    parts = node.args[0]
    taken = parts[0].args[0] if parts and isinstance(parts[0], fx.Node) and parts[0].args else None
    if dim != 0 or not isinstance(taken, fx.Node) or taken.target not in ("unbind", torch.unbind):
        return None
    if taken.kwargs or taken.args[1:] not in ((), (0,)):
        return None
    in_order = [each.target is operator.getitem and each.args == (taken, i) for i, each in enumerate(parts)]
    counts = [user.args[1] for user in taken.users if user.target is guard_parts]
    return taken if all(in_order) and counts == [len(parts)] else None
