"""Small readings that the parts of the pass share."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx as fx
from torch import nn

from fxopt.graph import Region, reads_sizes, why_not_plain

_FUNCTIONS: dict[Any, str] = {
    operator.add: "add", operator.iadd: "add", torch.add: "add", operator.sub: "sub", operator.isub: "sub",
    torch.sub: "sub", operator.mul: "mul", operator.imul: "mul", torch.mul: "mul", operator.truediv: "div",
    operator.itruediv: "div", torch.div: "div",
}  # fmt: skip
_METHODS = {f"{name}{end}": name for name in ("add", "sub", "mul", "div") for end in ("", "_")}
_METHODS["contiguous"] = "contiguous"


def operator_name(node: Any) -> str:
    """`add`, `sub`, `mul` or `div`, in place or not, or `contiguous`; "" for anything else."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    table: dict[Any, str] = _FUNCTIONS if node.op == "call_function" else _METHODS
    return table.get(node.target, "")


def operands(node: fx.Node) -> tuple[Any, Any] | None:
    """Both sides of a binary call; None where it is told more than that."""
    given = (*node.args, *node.kwargs.values())
    return (given[0], given[1]) if len(given) == 2 and not node.kwargs.keys() - {"input", "other"} else None


def only_user(node: fx.Node) -> fx.Node | None:
    """The one node that uses a value, not counting those that ask for its sizes; None where there are more."""
    users = [user for user in node.users if not reads_sizes(user)]
    return users[0] if len(users) == 1 and users[0].op != "output" else None


def identity_of(node: Any, region: Region, passed: list[fx.Node]) -> Any:
    """What a value is before modules that return what they are given, which are noted."""
    while isinstance(node, fx.Node) and node.op == "call_module" and only_user(node) is not None:
        module = region.submodule(node)
        dropped = isinstance(module, nn.Dropout) and not module.training and not region.training
        base = nn.Dropout if dropped else nn.Identity
        if not isinstance(module, base) or why_not_plain(module, base) is not None or not node.args:
            break
        passed.append(node)
        node = node.args[0]
    return node
