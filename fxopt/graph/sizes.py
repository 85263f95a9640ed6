"""Nodes that know of a tensor what it is, and not what is in it."""

from __future__ import annotations

import torch.fx as fx

_METHODS = ("size", "dim", "numel")
_ATTRIBUTES = ("shape", "ndim", "device", "dtype")


def reads_sizes(node: fx.Node) -> bool:
    """Whether `node` reads of its input no value, but a size or the like."""
    if node.target is getattr:
        return node.args[1] in _ATTRIBUTES
    return node.op == "call_method" and node.target in _METHODS
