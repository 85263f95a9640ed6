"""Casts that change nothing, reshapes of reshapes, transposes that undo each other.

x.float()                      =>  x                     where x is float32 already, and no input
x.view(a).view(b)              =>  x.view(b)
x.transpose(1, 2).mT           =>  (kept; only calls with the same spelling are compared)
x.permute(p).permute(q)        =>  x.permute(p[q]), or x where that is the order it had
"""

from __future__ import annotations

import operator

import torch
import torch.fx as fx

from fxopt.contract import Change
from fxopt.graph import Effects, Region, order_of_axes, source_of

_CASTS = {
    "float": torch.float32,
    "double": torch.float64,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "long": torch.int64,
    "int": torch.int32,
    "bool": torch.bool,
}
_RESHAPES = ("view", "reshape")
_KEEP_ORDER = ("view", "reshape", "flatten", "squeeze", "unsqueeze")


def simplify(node: fx.Node, region: Region) -> Change | None:
    """The first rule that fits `node`, applied."""
    name = _name(node)
    source = node.args[0] if node.args else None
    if not name or not isinstance(source, fx.Node):
        return None
    if _is_no_cast(node, name, source) or (
        name == "contiguous" and _name(source) == "contiguous" and _plain(node, source)
    ):
        return _drop(node, source, region, f"removed: '{name}' returns what it is given")
    if name in _RESHAPES and _name(source) in _KEEP_ORDER:
        return _reshape(node, source, region)
    return _permute(node, source, region)


def _name(node: fx.Node) -> str:
    """The method that a node calls, or the torch function of the same name."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    name = getattr(node.target, "__name__", "")
    return name if getattr(torch, name, None) is node.target else ""


def _plain(*nodes: fx.Node) -> bool:
    return all(len(node.args) == 1 and not node.kwargs for node in nodes)


def _is_no_cast(node: fx.Node, name: str, source: fx.Node) -> bool:
    """Whether it casts to the dtype that the tensor has. Such a cast returns the very same tensor.

    That of an input is for those that come in another dtype.
    """
    dtype = getattr(source.meta.get("tensor_meta"), "dtype", None)
    if dtype is None or _is_given(source):
        return False
    if name in _CASTS and _plain(node):
        return bool(_CASTS[name] is dtype)
    wanted = node.args[1] if len(node.args) > 1 else node.kwargs.get("dtype")
    options = set(node.kwargs) - {"dtype"}
    return name in ("to", "type") and len(node.args) <= 2 and not options and wanted is dtype


def _is_given(node: fx.Node) -> bool:
    """Whether it is an input, or a part of one."""
    while node.target is operator.getitem and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node.op == "placeholder"


def _drop(node: fx.Node, source: fx.Node, region: Region, what: str) -> Change:
    change = Change(what, region.qualified(node), source_of(node))
    node.replace_all_uses_with(source)
    region.graph.erase_node(node)
    return change


def _reshape(node: fx.Node, inner: fx.Node, region: Region) -> Change | None:
    origin = inner.args[0] if inner.args else None
    if len(inner.users) != 1 or not isinstance(origin, fx.Node) or node.kwargs or inner.kwargs.get("dtype") is not None:
        return None
    if any(isinstance(item, torch.dtype) for item in (*node.args, *inner.args)):
        return None
    name = "view" if (_name(node), _name(inner)) == ("view", "view") else "reshape"
    # A reshape copies where it can't be a view, so that two of them may copy where one would not.
    if name == "reshape" and node in Effects(region).written():
        return None
    change = Change(f"joined with the {_name(inner)!r} before it", region.qualified(node), source_of(node))
    with region.graph.inserting_before(node):
        shape = tuple(node.args[1:])
        region.replace(node, region.graph.call_method(name, (origin, *shape)))
    return change


def _permute(node: fx.Node, inner: fx.Node, region: Region) -> Change | None:
    origin = inner.args[0] if inner.args else None
    first, second = order_of_axes(inner), order_of_axes(node)
    if not isinstance(origin, fx.Node) or first is None or second is None or len(inner.users) != 1:
        return None
    order = [first[axis] for axis in second]
    if order == sorted(order):
        return _drop(node, origin, region, f"removed: it undoes the {_name(inner)!r} before it")
    if _name(node) != "permute" or _name(inner) != "permute":
        return None
    change = Change("joined with the 'permute' before it", region.qualified(node), source_of(node))
    with region.graph.inserting_before(node):
        region.replace(node, region.graph.call_method("permute", (origin, *order)))
    return change
