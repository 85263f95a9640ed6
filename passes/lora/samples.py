"""Where the samples of a batch are in a graph: a mixed batch takes them to lie along the first axis."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch.fx as fx
from torch import nn

from fxopt.graph import GraphModule, order_of_axes
from passes.lora.adapter import LayerAdapter

_RESHAPE = ("reshape", "view", "flatten", "unflatten", "embedding")


def without_samples(module: nn.Module) -> Iterator[tuple[LayerAdapter, str]]:
    """The adapters that are given no samples, or samples along another axis, and how that is known."""
    for captured in module.modules():
        for graph in captured.graphs.values() if isinstance(captured, GraphModule) else ():
            known, axes = _with_samples(graph), _axis_of_samples(graph, captured)
            for node in graph.nodes:
                called = captured.get_submodule(str(node.target)) if node.op == "call_module" else None
                if isinstance(called, LayerAdapter) and node.args[0] not in known:
                    why = "sees no samples, since what it is given does not come from the inputs, as positions don't"
                    yield called, why
                elif isinstance(called, LayerAdapter) and axes.get(node.args[0]):
                    yield called, f"sees samples along axis {axes[node.args[0]]}, not along the first"


def _with_samples(graph: fx.Graph) -> set[fx.Node]:
    """The values that come from the inputs, or have their number of samples."""
    found = set[fx.Node]()
    for node in graph.nodes:
        of_sizes = node.target is operator.getitem and getattr(node.args[0], "target", None) in ("size", getattr)
        sizes = node.target == "size" or of_sizes
        if sizes and node.args[1:] not in ((), (0,)):  # another size than the number of samples
            continue
        if node.target is getattr and node.args[1] in ("device", "dtype"):
            continue
        if node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _axis_of_samples(graph: fx.Graph, owner: nn.Module) -> dict[fx.Node, int]:
    """The axis of the samples of each value, as far as it is sure."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            found[node] = 0
        elif (axes := order_of_axes(node)) is not None:
            if node.args[0] in found:
                found[node] = axes.index(found[node.args[0]])
        else:
            name = _name(node, owner)
            kept = [
                found[each] for each in node.all_input_nodes if each in found and _keeps(each, node, found[each], name)
            ]
            if kept:
                found[node] = max(kept)
    return found


def _name(node: fx.Node, owner: nn.Module) -> str:
    if node.op == "call_module":
        return type(owner.get_submodule(str(node.target))).__name__.lower()
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def _keeps(value: fx.Node, node: fx.Node, axis: int, name: str) -> bool:
    """Whether samples stay along an axis: nothing up to it has changed, and none but a few functions adds axes."""
    before, after = _shape(value), _shape(node)
    if before is None or after is None or name == "einsum":
        return False
    return before[: axis + 1] == after[: axis + 1] and (len(before) == len(after) or name in _RESHAPE)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    return None if shape is None else tuple(shape)
