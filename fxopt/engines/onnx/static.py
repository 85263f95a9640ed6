"""Static inputs as constants of an exported model, with all that is computed of them alone.

x.split(lengths.tolist())   =>   x.split([3, 5])     for lengths of 3 and 5

An exporter follows sizes, and no numbers out of tensors; what it can't follow it would refuse.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.fx as fx

from fxopt.capture.guards import GUARDS
from fxopt.contract import Skip
from fxopt.graph import Effects, GraphModule, Program, Region, eliminate_dead, observe
from fxopt.inputs import Inputs

_INDEXING = (operator.getitem, operator.setitem)
_NUMBERS = (bool, int, float, torch.Size)


def with_static_values(module: GraphModule, inputs: Inputs) -> tuple[GraphModule, tuple[Skip, ...]]:
    """`module`, or a copy in which its static inputs are read as they are in `inputs`, and a reason that says so."""
    if not inputs.static:
        return module, ()
    module = copy.deepcopy(module)
    region = next(region for region in Program(module).regions if region.graph is module.graph)
    known = _computed_of_static(region, inputs)
    values: dict[fx.Node, Any] = {}

    def visit(owner: GraphModule, node: fx.Node, value: Any) -> None:
        if node in known and isinstance(value, (torch.Tensor, *_NUMBERS)):
            values[node] = value

    given = inputs.map(lambda tensor: tensor.detach().clone())
    observe(module, given.args, given.kwargs, visit)
    for node in [node for node in region.graph.nodes if node.target in GUARDS]:
        if {*node.all_input_nodes} <= known:  # it held just now
            region.graph.erase_node(node)
    for node, value in values.items():
        _read_as(region, node, value, [user for user in node.users if user not in values])
    eliminate_dead(region)
    module.recompile()
    taken = [str(node.target) for node in _placeholders(module.graph)]
    named = [key if isinstance(key, str) else taken[min(key, len(taken) - 1)] for key in inputs.static]
    return module, (Skip("", f"the values of {', '.join(map(repr, named))} are those of the example"),)


def _placeholders(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _computed_of_static(region: Region, inputs: Inputs) -> set[fx.Node]:
    """The static inputs, and what is computed of them, of constants and parameters, and of nothing else."""
    effects = Effects(region)
    written = effects.written()
    placeholders = _placeholders(region.graph)
    known = {node for index, node in enumerate(placeholders) if _names(inputs, index, node)} - written
    constant: set[fx.Node] = set()
    for node in region.graph.nodes:
        if node.op in ("placeholder", "output") or node in written or not effects.is_pure(node):
            continue
        read = {*node.all_input_nodes}
        if read <= constant:
            constant.add(node)
        elif read <= known | constant or _is_static_item(node, placeholders, inputs):
            known.add(node)
    return known


def _names(inputs: Inputs, index: int, node: fx.Node) -> bool:
    return not str(node.target).startswith("*") and (index in inputs.static or node.target in inputs.static)


def _is_static_item(node: fx.Node, placeholders: list[fx.Node], inputs: Inputs) -> bool:
    """Whether it reads a static input out of what a forward takes by `*` or `**`."""
    if node.target is not operator.getitem or node.args[0] not in placeholders:
        return False
    owner, key = node.all_input_nodes[0], cast(Any, node.args[1])
    taken = str(owner.target)
    return (
        taken.startswith("*") and (key if taken.startswith("**") else placeholders.index(owner) + key) in inputs.static
    )


def _read_as(region: Region, node: fx.Node, value: Any, users: list[fx.Node]) -> None:
    """Let `users` read a value in the place of `node`."""
    if not users:
        return
    other = _held(region, node, value) if isinstance(value, torch.Tensor) else value
    for user in users:
        if user.target in _INDEXING and isinstance(value, torch.Tensor):
            owner, index, *rest = user.args
            index = index if isinstance(index, tuple) else (index,)
            user.args = (owner, tuple(_with_sizes(region, node, value, index)), *rest)
        user.args = fx.map_arg(user.args, lambda each: other if each is node else each)
        user.kwargs = fx.map_arg(user.kwargs, lambda each: other if each is node else each)


def _with_sizes(region: Region, node: fx.Node, value: torch.Tensor, index: tuple[Any, ...]) -> Iterator[Any]:
    """An index of which the size of what it picks is known: numbers as ends of slices, and the places of a mask."""
    for each in index:
        if isinstance(each, slice):
            yield slice(*(int(value) if end is node else end for end in (each.start, each.stop, each.step)))
        elif each is node and value.dtype is torch.bool and value.dim() > 0:
            yield from (_held(region, node, places) for places in value.nonzero(as_tuple=True))
        else:
            yield each


def _held(region: Region, node: fx.Node, value: torch.Tensor) -> fx.Node:
    name = region.add_buffer(f"static_{node.name}", value.detach().clone(), persistent=False)
    return region.insert_attribute(node.next, name)
