"""What a graph may notice of its values being in channels_last: found, and kept from it.

The kernels give outputs in channels_last. Nearly all operators take any strides; `view` does not, Python code that no
graph shows may not, and the outputs should have the strides that the module gives them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from fxopt.graph import Effects, Region

_READ_STRIDES = frozenset("as_strided stride storage_offset data_ptr is_contiguous untyped_storage set_".split())
_VIEWS = frozenset({"view", "view_as"})


def why_noticed(region: Region) -> str | None:
    """Why other strides would change what a graph computes; None where they would not."""
    effects = Effects(region)
    aliases = None
    for node in region.graph.nodes:
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op in ("call_method", "call_function") and name in _READ_STRIDES:
            return f"'{region.qualified(node)}' looks at strides"
        if node.op == "call_method" and name in _VIEWS:
            aliases = aliases or effects.aliases()
            group = aliases(node)
            if any(target in group for other in region.graph.nodes for target in effects.writes(other)):
                return f"'{region.qualified(node)}' is a view of memory that is written"
    return None


def hide(region: Region) -> None:
    """Let views copy where they must, and give the strides of the module to its outputs and to unseen code."""
    effects = Effects(region)
    for node in list(region.graph.nodes):
        if node.op == "call_method" and node.target in _VIEWS:
            if any(isinstance(argument, torch.dtype) for argument in (*node.args, *node.kwargs.values())):
                _make_contiguous(node, region)
            else:
                node.target = {"view": "reshape", "view_as": "reshape_as"}[str(node.target)]
        elif node.op == "output" or (node.op.startswith("call_") and not effects.is_known(node)):
            _make_contiguous(node, region)


def _make_contiguous(node: fx.Node, region: Region) -> None:
    def contiguous(value: fx.Node) -> Any:
        if not value.op.startswith("call_") or not _was_contiguous(value):
            return value
        with region.graph.inserting_before(node):
            made = region.graph.call_method("contiguous", (value,))
        made.meta = dict(value.meta)
        return made

    node.args = fx.node.map_arg(node.args, contiguous)
    node.kwargs = fx.node.map_arg(node.kwargs, contiguous)


def _was_contiguous(value: fx.Node) -> bool:
    meta = value.meta.get("tensor_meta")
    return meta is not None and len(meta.shape) > 2 and meta.memory_format is torch.contiguous_format
