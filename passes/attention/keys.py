"""Keys and values as attention takes them: not transposed, and one for each group of heads."""

from __future__ import annotations

import torch.fx as fx

from fxopt.graph import Effects, Region, name_of
from passes.attention.call import given, shape_of


def transposed(node: fx.Node, before: fx.Node, region: Region) -> fx.Node:
    """`node` with its last two axes exchanged: what it was before it was transposed, or a view of it."""
    inner, rank = node.args[0] if node.args else None, len(shape_of(node) or ())
    if isinstance(inner, fx.Node):
        axes = {axis % rank for axis in node.args[1:] if isinstance(axis, int)}
        if name_of(node) in ("transpose", "swapaxes") and not node.kwargs and axes == {rank - 2, rank - 1}:
            return inner
        if name_of(node) == "getattr" and node.args[1] == "mT":
            return inner
    with region.graph.inserting_before(before):
        return region.graph.call_method("transpose", (node, -2, -1))


def ungrouped(node: fx.Node, end: fx.Node, region: Region) -> tuple[fx.Node, int] | None:
    """Heads (batch, heads, length, width) before each was repeated for its group, and how often it was.

    None too where either is written before `end`: one would not be a repetition of the other any more.
    """
    found = _repeated(node)
    effects = Effects(region)
    if found is None or any(effects.written_between(value, value, end) for value in (node, found[0])):
        return None
    return found


def _repeated(node: fx.Node) -> tuple[fx.Node, int] | None:
    shape = shape_of(node)
    inner = node.args[0] if node.args else None
    if shape is None or len(shape) != 4 or not isinstance(inner, fx.Node):
        return None
    if name_of(node) == "repeat_interleave":
        asked = given(node, "input", "repeats", "dim")
        repeats, axis = asked.get("repeats"), asked.get("dim")
        return (inner, repeats) if isinstance(repeats, int) and axis in (1, -3) and repeats > 1 else None
    if name_of(node) not in ("reshape", "view", "flatten") or name_of(inner) != "expand":
        return None
    single, wide = inner.args[0], shape_of(inner)
    if not isinstance(single, fx.Node) or wide is None or len(wide) != 5:
        return None
    heads, base = single.args[0] if single.args else None, shape_of(single)
    if not isinstance(heads, fx.Node) or base is None or base[2] != 1 or not _inserts_axis(single):
        return None
    same = base[:2] + base[3:] == shape_of(heads) == wide[:2] + wide[3:] and shape[1] == wide[1] * wide[2]
    return (heads, wide[2]) if same and shape[2:] == wide[3:] and wide[2] > 1 else None


def _inserts_axis(node: fx.Node) -> bool:
    """Whether a call only inserts an axis at 2."""
    if name_of(node) == "unsqueeze":
        return given(node, "input", "dim").get("dim") == 2
    index = node.args[1] if name_of(node) == "getitem" else None
    if not isinstance(index, tuple) or index[:3] != (slice(None), slice(None), None):
        return False
    return all(item == slice(None) for item in index[3:])
