"""Parameters that are added to a value row by row, as a vision transformer's table of positions is."""

from __future__ import annotations

import torch.fx as fx

from fxopt.graph import Region, behind_mask, read_parameter
from fxopt.graph.effects import ADDS, ADDS_INTO


def added_table(node: fx.Node, region: Region) -> tuple[fx.Node, int] | None:
    """The read of a table that `node` adds, or the call of its mask, and the dimension that counts its rows.

    A bias or a scale, with one dimension that is longer than 1, is no table; nor is what is written into.
    """
    if node.op not in ("call_function", "call_method") or node.target not in ADDS:
        return None
    for read in node.all_input_nodes:
        if node.target in ADDS_INTO and read is node.args[0]:
            continue
        parameter = read_parameter(behind_mask(read, region), region)
        if parameter is not None and sum(size > 1 for size in parameter.shape) > 1:
            return read, parameter.dim() - 2
    return None
