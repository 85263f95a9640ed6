"""Guards on values that come of sizes and weights alone: decided before any call, or once for each batch size.

if (torch.arange(x.size(1)).diff() == 1).all(): ...   =>   (nothing)     in a model built for one x.size(1)

Exporters cannot keep them: they know sizes, but not what is in a tensor. Those on sizes themselves they leave out.
"""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx as fx

from fxopt.capture.guards import guard, guard_tensor
from fxopt.errors import GuardError
from fxopt.graph import Effects, GraphModule, Program, Region, eliminate_dead, observe, reads_sizes
from fxopt.inputs import Inputs

_OUT_OF_TENSORS = ("item", "tolist")


def without_decided_guards(module: GraphModule, tries: Sequence[Inputs]) -> tuple[GraphModule, bool]:
    """`module`, or a copy without the guards that only sizes and weights decide, where they hold in all `tries`.

    Returns:
        The module, and whether a guard depends on sizes in which `tries` differ, which an exported model lacks.
    """
    if not _guards(module):
        return module, False
    module = copy.deepcopy(module)
    guards, candidates = _guards(module), _candidates(module)
    seen: dict[fx.Node, list[Any]] = {}

    def visit(owner: GraphModule, node: fx.Node, value: Any) -> None:
        if isinstance(value, (int, float, torch.Size, torch.device, torch.dtype)):
            seen.setdefault(node, []).append(value)

    @functools.cache
    def differs(node: fx.Node) -> bool:
        """Whether a number, or one that it is computed of, is another in another try: it may be another in a third."""
        values = seen.get(node, [])
        return any(value != values[0] for value in values) or bool(values and any(map(differs, node.all_input_nodes)))

    try:
        for inputs in tries:
            given = inputs.map(lambda tensor: tensor.detach().clone())
            observe(module, given.args, given.kwargs, visit)
    except GuardError:  # one of the tries is none that the graph holds for
        return module, True
    depends = any(differs(value) for node in guards for value in node.all_input_nodes)
    for region in Program(module).regions:
        decided = [node for node in region.graph.nodes if node in candidates and seen.keys() >= {*candidates[node]}]
        for node in decided:
            depends = depends or any(map(differs, candidates[node]))
            region.graph.erase_node(node)
        if decided:
            eliminate_dead(region)
            region.module.recompile()
    return module, depends


def _guards(module: GraphModule) -> list[fx.Node]:
    nodes = (node for region in Program(module).regions for node in region.graph.nodes)
    return [node for node in nodes if node.op == "call_function" and node.target in (guard, guard_tensor)]


def _candidates(module: GraphModule) -> dict[fx.Node, list[fx.Node]]:
    return {node: sizes for region in Program(module).regions for node, sizes in _of_sizes(region).items()}


def _of_sizes(region: Region) -> dict[fx.Node, list[fx.Node]]:
    """The guards on values that come of sizes, weights and constants alone, each with the nodes that read sizes."""
    effects = Effects(region)
    written = effects.written()
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in region.graph.nodes:
        if node.op != "call_function" or node.target not in (guard, guard_tensor):
            continue
        sizes: list[fx.Node] = []
        work, reached = list(node.all_input_nodes), set()
        while work:
            value = work.pop()
            if value in reached:
                continue
            reached.add(value)
            if reads_sizes(value):
                sizes.append(value)
            elif value.op == "get_attr":
                if value in written:
                    break
            elif value.op not in ("call_function", "call_method") or not effects.is_pure(value):
                break
            else:
                work.extend(value.all_input_nodes)
        else:
            if node.target is guard_tensor or any(map(_is_out_of_tensor, reached)):
                found[node] = sizes
    return found


def _is_out_of_tensor(node: fx.Node) -> bool:
    return node.target is operator.truth or (node.op == "call_method" and node.target in _OUT_OF_TENSORS)
