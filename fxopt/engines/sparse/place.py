"""Puts the chosen kernels into a graph, and carries features-first values from one to the next."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.engines.binding import named
from fxopt.engines.layer import Layer
from fxopt.engines.sparse.kernels import Kernel
from fxopt.engines.sparse.layout import broadcast, of_both, to_features_first, to_features_last
from fxopt.graph import Effects, Region

_POINTWISE_MODULES = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Hardswish, nn.LeakyReLU, nn.Identity)
_POINTWISE: frozenset[Any] = frozenset(
    {torch.relu, F.relu, F.gelu, F.silu, torch.tanh, F.tanh, torch.sigmoid, F.sigmoid, "relu", "tanh", "sigmoid"}
)
_IN_PLACE: Mapping[Any, Any] = {
    **dict.fromkeys((nn.ReLU, torch.relu, F.relu, "relu"), torch.relu_),
    **dict.fromkeys((nn.Tanh, torch.tanh, F.tanh, "tanh"), torch.tanh_),
    **dict.fromkeys((nn.Sigmoid, torch.sigmoid, F.sigmoid, "sigmoid"), torch.sigmoid_),
}
"""What computes the same in the memory of its argument."""


class Placement:
    """Rewrites one graph.

    Args:
        region: of a copy whose graph may be used up.
        layers: that are replaced, by the node where each begins.
        last: the kernels with features last, by the same nodes.
        first: those with features first.
    """

    def __init__(
        self,
        region: Region,
        layers: Mapping[fx.Node, Layer],
        last: Mapping[fx.Node, Kernel],
        first: Mapping[fx.Node, Kernel],
    ):
        self._region = region
        self._graph = region.graph
        self._layers = layers
        self._last = last
        self._first = first
        self._of: dict[fx.Node, fx.Node] = {}
        """Which node has the value of another with features first."""
        self._now: dict[fx.Node, fx.Node] = {}
        """Which node has the value of one that was replaced."""
        self._like: dict[fx.Node, fx.Node] = {}
        """The value with features last from which one with features first came."""
        self._fresh: set[fx.Node] = set()
        """Values with features first that were computed into memory of their own."""

    def run(self) -> None:
        """Replace all layers, and take out what nothing reads then."""
        made: list[fx.Node] = []
        written = Effects(self._region).written()
        for node in list(self._graph.nodes):
            layer = self._layers.get(node)
            if layer is not None:
                # What is computed together stands where the last of it stood.
                made.append(self._put(layer))
            elif node in self._of or node._erased:
                continue
            elif node not in written and self._is_pointwise(node):
                made.append(self._pointwise(node))
        for node in reversed(list(self._graph.nodes)):
            if not node.users and (node in made or node in self._of.values()):
                self._graph.erase_node(node)

    def _put(self, layer: Layer) -> fx.Node:
        graph, node = self._graph, layer.node
        kernel = self._first.get(node)
        given = [layer.input] if layer.other is None else [layer.input, layer.other]
        given = [self._now.get(value, value) for value in given]
        with graph.inserting_before(layer.last):
            if kernel is None:
                done = graph.call_function(named(self._last[node], node.name), tuple(given))
            else:
                firsts = [self._first_of(value, layer.last) for value in given]
                likes = [self._like.get(value, value) for value in given]
                like = likes[0]
                if likes[-1] is not like:  # of another batch than the example's one of them may be broadcast
                    like = graph.call_function(of_both, tuple(likes))
                    firsts = [graph.call_function(broadcast, (*pair, like)) for pair in zip(firsts, likes, strict=True)]
                first = graph.call_function(named(kernel, node.name), tuple(firsts))
                self._fresh.add(first)
                done = self._back(first, like)
        self._replace(layer.last, done)
        if node is not layer.last:
            graph.erase_node(node)
        return done

    def _pointwise(self, node: fx.Node) -> fx.Node:
        value = node.all_input_nodes[0]
        known = self._of[value]
        kind = type(self._region.submodule(node)) if node.op == "call_module" else node.target
        # What a kernel has just computed and nothing else reads needs no memory of its own.
        may_write = known in self._fresh and len(value.users) == 1 and set(known.users) <= {value}
        with self._graph.inserting_before(node):
            if may_write and kind in _IN_PLACE:
                first = self._graph.call_function(_IN_PLACE[kind], (known,))
            else:
                first = self._graph.node_copy(node, lambda _: known)
            if kind is not nn.Identity:
                self._fresh.add(first)
            done = self._back(first, self._like[value])
        self._replace(node, done)
        return done

    def _is_pointwise(self, node: fx.Node) -> bool:
        inputs = node.all_input_nodes
        if len(inputs) != 1 or inputs[0] not in self._of or node.kwargs.get("inplace"):
            return False
        if node.op == "call_module":
            module = self._region.submodule(node)
            return type(module) in _POINTWISE_MODULES and not getattr(module, "inplace", False)
        return node.op in ("call_function", "call_method") and node.target in _POINTWISE and len(node.args) == 1

    def _first_of(self, value: fx.Node, before: fx.Node) -> fx.Node:
        known = self._of.get(value)
        # A layer that ends late, with an addition, may have asked first.
        if known is None or not known < before:
            known = self._of[value] = self._graph.call_function(to_features_first, (value,))
        return known

    def _back(self, first: fx.Node, like: fx.Node) -> fx.Node:
        done = self._graph.call_function(to_features_last, (first, like))
        self._of[done] = first
        self._like[done] = like
        return done

    def _replace(self, old: fx.Node, new: fx.Node) -> None:
        self._now[old] = new
        old.replace_all_uses_with(new)
        self._graph.erase_node(old)
