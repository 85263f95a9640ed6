"""What may notice that a value has other strides than before: found, and kept from it.

A rewrite may give equal values in another layout: a slice of a larger tensor, a transposed result. Nearly all
operators take any strides; `view` does not, and Python code that no graph shows may not.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.fx as fx

from fxopt.graph.effects import Effects
from fxopt.graph.region import Region

READ_STRIDES = frozenset("as_strided stride storage_offset data_ptr is_contiguous untyped_storage set_".split())
VIEWS = {"view": "reshape", "view_as": "reshape_as"}


def why_noticed(value: fx.Node, region: Region) -> str | None:
    """Why other strides of `value`, a freshly computed one, would change what the graph computes; None if nothing."""
    effects = Effects(region)
    for shared, user in _uses(value, effects):
        name = user.target if isinstance(user.target, str) else getattr(user.target, "__name__", "")
        if name in READ_STRIDES and user.op.startswith("call_"):
            return f"'{region.qualified(user)}' looks at its strides"
        if shared in effects.writes(user) and effects.is_known(user):
            return f"'{region.qualified(user)}' writes into it"
        if user.target == "view" and any(isinstance(item, torch.dtype) for item in (*user.args, *user.kwargs.values())):
            return f"'{region.qualified(user)}' views it as another dtype"
    return None


def hide_strides(value: fx.Node, region: Region) -> None:
    """Let views of `value` copy where they must, and give outputs and unseen code a contiguous tensor as before."""
    effects = Effects(region)
    for shared, user in list(_uses(value, effects)):
        if user.op == "call_method" and user.target in VIEWS:
            user.target = VIEWS[str(user.target)]
        elif _is_unseen(user, effects) and was_contiguous(shared):
            with region.graph.inserting_before(user):
                made = region.graph.call_method("contiguous", (shared,))
            made.meta = dict(shared.meta)
            user.replace_input_with(shared, made)


def _uses(value: fx.Node, effects: Effects) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Each node that may share memory with `value`, itself included, with each of its users."""
    work, seen = [value], {value}
    while work:
        shared = work.pop()
        for user in shared.users:
            yield shared, user
            if user not in seen and not _is_unseen(user, effects) and shared in effects.may_alias(user):
                seen.add(user)
                work.append(user)


def _is_unseen(user: fx.Node, effects: Effects) -> bool:
    return user.op == "output" or (user.op.startswith("call_") and not effects.is_known(user))


def was_contiguous(value: fx.Node) -> bool:
    """Whether a value was contiguous when the module was captured."""
    meta = value.meta.get("tensor_meta")
    return meta is not None and meta.memory_format is torch.contiguous_format
