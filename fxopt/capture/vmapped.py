"""`torch.vmap`: what it maps is recorded as a graph of its own, and the mapping as one call of that.

What the mapped function uses beside its arguments (parameters, masks, sizes) is an argument of the call too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.utils import _pytree as pytree

from fxopt.capture.provenance import Depends
from fxopt.capture.recorder import Recorder
from fxopt.capture.structure import without_numbers
from fxopt.capture.tape import Unrecordable
from fxopt.capture.tensors import Origin
from fxopt.graph import GraphModule


@dataclass(frozen=True)
class Told:
    """What `torch.vmap` was told: dimensions of its inputs and outputs, and what random numbers do."""

    in_dims: Any
    out_dims: Any
    randomness: str


class Vmapped:
    """A node's target: maps a graph over a dimension of its arguments."""

    def __init__(self, graph: fx.Graph, how: Told):
        self.how = how
        self.module = GraphModule(nn.Module(), {False: graph}, "Vmapped")
        self.__name__ = "vmapped"
        self.__module__ = __name__

    def __call__(self, beside: tuple[Any, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run it.

        Args:
            beside: what the function uses that is no argument of it.
            args: positional arguments.
            kwargs: keyword arguments.
        """

        def one(*parts: Any, **named: Any) -> Any:
            return self.module(*pytree.tree_leaves((parts, named)), *beside)

        return torch.vmap(one, self.how.in_dims, self.how.out_dims, self.how.randomness)(*args, **kwargs)

    def _calls(self) -> list[tuple[Any, ...]]:
        return [(n.op, n.target, str(n.args), str(n.kwargs)) for n in self.module.graph.nodes]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vmapped) and self.how == other.how and self._calls() == other._calls()

    def __hash__(self) -> int:
        return hash((Vmapped, len(self.module.graph.nodes)))

    def __repr__(self) -> str:
        return self.__name__


def record_vmap(
    recorder: Recorder,
    vmap: Callable[..., Any],
    function: Callable[..., Any],
    how: Told,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Call `vmap`, which is torch's own, and record what it maps.

    Args:
        recorder: is recording.
        vmap: takes the function, then what `torch.vmap` was told, then the arguments.
        function: what is mapped.
        how: what `torch.vmap` was told.
        args: positional arguments.
        kwargs: keyword arguments.
    """
    outside, inside = recorder.graph, fx.Graph()
    origin = Origin(Depends.CONSTANT, Depends.CONSTANT, Depends.CONSTANT)
    recorder.active = False
    recorder.calls += 1

    def recorded(*parts: Any, **named: Any) -> Any:
        nonlocal origin
        recorder.graph = inside
        try:
            for index, leaf in enumerate(pytree.tree_leaves((parts, named))):
                node = inside.create_node("placeholder", f"argument_{index}")
                # What is not mapped is what it was outside.
                if isinstance(leaf, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(leaf):
                    recorder.adopt_tensor(node, leaf, given)
            recorder.active = True
            result = function(*parts, **named)
            recorder.active = False
            inside.output(recorder.argument(result))
            made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            values = max(map(recorder.depends, made), default=Depends.CONSTANT)
            origin = Origin(values, max((recorder.known(leaf).shape for leaf in made), default=values), values)
            return without_numbers(result)
        finally:
            recorder.active = False
            recorder.graph = outside

    try:
        node_args, node_kwargs = recorder.argument(args), recorder.argument(kwargs)
        given = recorder.origin("", args, kwargs)
        plain = without_numbers(args), without_numbers(kwargs)
        result = vmap(recorded, how.in_dims, how.out_dims, how.randomness, None, *plain[0], **plain[1])
        beside = _take_out(inside)
        recorder.forget_sizes_of(inside)
        node = recorder.emit("call_function", Vmapped(inside, how), (beside, node_args, node_kwargs))
        return recorder.adopt(node, result, origin)
    except Unrecordable as reason:
        recorder.block(f"a function under vmap was given {reason}")
        return vmap(function, how.in_dims, how.out_dims, how.randomness, None, *args, **kwargs)
    finally:
        recorder.active = True


def _take_out(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """Make placeholders of the nodes of other graphs that `graph` uses, and return those."""
    places: dict[fx.Node, fx.Node] = {}
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for node in list(graph.nodes):
        for used in node.all_input_nodes:
            if used.graph is graph:
                continue
            if used not in places:
                with graph.inserting_before(first):
                    places[used] = graph.create_node("placeholder", f"beside_{len(places)}")
            node.replace_input_with(used, places[used])
    return tuple(places)
