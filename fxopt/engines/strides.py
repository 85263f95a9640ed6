"""What a graph may notice of its values being in channels_last: found, and kept from it.

The kernels give outputs in channels_last. Nearly all operators take any strides; `view` does not, Python code that no
graph shows may not, and the outputs should have the strides that the module gives them.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from fxopt.graph import Effects, Region, rank_of
from fxopt.graph.strides import READ_STRIDES, VIEWS, was_contiguous

_MAY_COPY = VIEWS.keys() | frozenset("reshape reshape_as flatten ravel contiguous".split())
"""What gives the memory of its argument or a copy, as its strides have it."""
_DRAWING = frozenset(
    "dropout rand_like randn_like randint_like bernoulli_ normal_ uniform_ exponential_ random_ geometric_ cauchy_ "
    "log_normal_".split()
)
"""What draws a random number for each element in the order of memory."""
_FORGETTING = frozenset(
    "size dim numel len item new_zeros new_ones new_empty new_full new_tensor linear layer_norm embedding".split()
)
"""What has the same strides whatever those of its arguments are."""
_MODULES = ((nn.Flatten, "flatten"), (nn.Dropout, "dropout"))
_FORGETTING_MODULES = (nn.Linear, nn.LayerNorm, nn.Embedding)


def why_noticed(region: Region, values: Set[fx.Node]) -> dict[fx.Node, str]:
    """Those of `values` whose strides change what the graph computes, each with the reason."""
    noticed: dict[fx.Node, str] = {}
    for node, reason in _looking(region):
        work, seen = [node], {node}
        while work:
            for value in work.pop().all_input_nodes:
                if value in seen:
                    continue
                seen.add(value)
                if value in values:
                    noticed.setdefault(value, reason)
                if not _forgets(value, region):
                    work.append(value)
    return noticed


def _looking(region: Region) -> Iterator[tuple[fx.Node, str]]:
    """Nodes that do something else where their arguments have other strides, and what."""
    effects = Effects(region)
    aliases = effects.aliases()
    writers = [(node, effects.writes(node)) for node in region.graph.nodes if effects.is_known(node)]
    writers = [(node, written) for node, written in writers if written]
    for node in region.graph.nodes:
        name = _name(node, region)
        if name in READ_STRIDES:
            yield node, f"'{region.qualified(node)}' looks at strides"
        elif name in _DRAWING and effects.is_random(node) and _draws(node, region) and rank_of(node) not in (0, 1, 2):
            yield node, f"'{region.qualified(node)}' draws random numbers in the order of memory"
        elif name in _MAY_COPY and any(
            writer > node and not aliases(node).isdisjoint(written) for writer, written in writers
        ):
            yield node, f"'{region.qualified(node)}' is a view of memory that is written"


def _draws(node: fx.Node, region: Region) -> bool:
    """Whether it draws in the mode of the graph; it may be told that of the module that calls it."""
    return not any(region.flag(value) is False for value in node.all_input_nodes)


def _name(node: fx.Node, region: Region) -> str:
    if node.op == "call_module":
        return next((name for kind, name in _MODULES if isinstance(region.submodule(node), kind)), "")
    if node.op in ("call_method", "call_function"):
        return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return ""


def _forgets(node: fx.Node, region: Region) -> bool:
    if node.op == "call_module":
        return type(region.submodule(node)) in _FORGETTING_MODULES
    if node.target is getattr:
        return node.args[1] in ("shape", "dtype", "device", "ndim", "requires_grad", "is_cuda")
    return _name(node, region) in _FORGETTING


def hide(region: Region) -> None:
    """Let views copy where they must, and give the strides of the module to its outputs and to unseen code."""
    effects = Effects(region)
    for node in list(region.graph.nodes):
        if node.op == "call_method" and node.target in VIEWS:
            if any(isinstance(argument, torch.dtype) for argument in (*node.args, *node.kwargs.values())):
                _make_contiguous(node, region)
            else:
                node.target = VIEWS[str(node.target)]
        elif node.op == "output" or (node.op.startswith("call_") and not effects.is_known(node)):
            _make_contiguous(node, region)


def _make_contiguous(node: fx.Node, region: Region) -> None:
    def contiguous(value: fx.Node) -> Any:
        # With two axes or fewer there is no channels_last.
        if not value.op.startswith("call_") or not was_contiguous(value) or len(value.meta["tensor_meta"].shape) < 3:
            return value
        with region.graph.inserting_before(node):
            made = region.graph.call_method("contiguous", (value,))
        made.meta = dict(value.meta)
        return made

    node.args = fx.node.map_arg(node.args, contiguous)
    node.kwargs = fx.node.map_arg(node.kwargs, contiguous)
