"""Reads transpositions off a node, in whichever form they are called."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx as fx

from fxopt.graph.norm import rank_of

_SWAPS = ("transpose", "swapaxes", "swapdims")


def order_of_axes(node: fx.Node) -> list[int] | None:
    """The axes of the input in the order in which a transposition puts them; None for others, or if it isn't known."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    is_ours = node.op == "call_method" or (node.op == "call_function" and getattr(torch, name, None) is node.target)
    rank, given = rank_of(node), list[Any](node.args[1:])
    if not is_ours or rank is None or node.kwargs:
        return None
    axes = list(range(rank))
    if len(given) == 1 and isinstance(given[0], (tuple, list)):
        given = list(given[0])
    if not all(isinstance(axis, int) for axis in given):
        return None
    if name == "t" and not given and rank == 2:
        return axes[::-1]
    if name == "permute" and len(given) == rank:
        return [axes[axis] for axis in given]
    if name in _SWAPS and len(given) == 2:
        one, two = given
        axes[one], axes[two] = axes[two], axes[one]
        return axes
    return None
