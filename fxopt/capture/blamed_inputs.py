"""By which inputs a value is what it is that code decided on, where those might be declared static."""

from __future__ import annotations

import operator

import torch.fx as fx

from fxopt.capture import operators
from fxopt.capture.describe import describe

_ITEMS = (operator.getitem, getattr)
_OF_SHAPES = operators.SHAPE_READS | operators.SHAPE_ONLY


def not_static(*nodes: fx.Node) -> str:
    """The inputs by whose values `nodes` are what they are, in words; none where a tensor of real numbers is there.

    Numbers that describe other inputs are integers; what is computed of real ones is rarely the same twice.
    """
    found: dict[str, None] = {}
    seen, work = {*nodes}, [*nodes]
    while work:
        value = work.pop()
        if _is_input(value):
            metadata = value.meta.get("tensor_meta")
            if metadata is None or metadata.dtype.is_floating_point or metadata.dtype.is_complex:
                return ""
            found[describe(value)] = None
        elif getattr(value.target, "__name__", value.target) not in _OF_SHAPES:
            work += [each for each in value.all_input_nodes if each not in seen]
            seen.update(value.all_input_nodes)
    named = ", ".join(map(repr, sorted(found)))
    return f" {named}, which `fxopt.Inputs(static=...)` does not name" if found else ""


def _is_input(node: fx.Node) -> bool:
    """Whether it is a tensor that the caller gave, alone or within a list, dict or object."""
    while node.target in _ITEMS and "tensor_meta" not in node.all_input_nodes[0].meta:
        node = node.all_input_nodes[0]
    return node.op == "placeholder"
