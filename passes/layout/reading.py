"""Small readings that the parts of the pass share."""

from __future__ import annotations

from typing import Any

import torch.fx as fx
from torch import nn

from fxopt.graph import Region, reads_sizes, why_not_plain


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
