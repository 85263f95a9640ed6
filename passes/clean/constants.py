"""What does not depend on any input, parameter or state is computed once, and what is computed twice, once.

torch.arange(8).unsqueeze(0)  =>  a buffer        up to a size
a = x.size(0); b = x.size(0)  =>  a
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch
import torch.fx as fx

from fxopt.contract import Change
from fxopt.graph import Effects, Modes, Region, source_of

_FACTORIES = frozenset(
    {torch.arange, torch.zeros, torch.ones, torch.full, torch.eye, torch.linspace, torch.tensor, torch.logspace}
)


class Sharing:
    """Which values nobody writes into, and which of these the caller receives."""

    def __init__(self, region: Region):
        self.effects = Effects(region)
        aliases = self.effects.aliases()
        returned = region.graph.output_node().all_input_nodes
        self._written = self.effects.written()
        self._shared = self._written.union(*map(aliases, returned))

    def is_written(self, node: fx.Node) -> bool:
        """Whether something may write into memory that `node` shares."""
        return node in self._written

    def is_private(self, node: fx.Node) -> bool:
        """Whether nothing writes into memory that `node` shares, here or where the outputs go."""
        return node not in self._shared

    def is_pure(self, node: fx.Node) -> bool:
        """Whether `node` always gives the same for the same arguments, and does nothing else."""
        if node.op not in ("call_function", "call_method") or "empty" in str(node.target):
            return False
        return self.effects.is_pure(node)


def fold_constants(region: Region, max_bytes: int) -> Iterator[Change]:
    """Replace constant expressions by buffers that are not part of the state."""
    sharing = Sharing(region)
    constant: dict[fx.Node, torch.Tensor] = {}
    for node in list(region.graph.nodes):
        if not sharing.is_pure(node) or not sharing.is_private(node):
            continue
        inputs = node.all_input_nodes
        starts = node.target in _FACTORIES and not inputs and "device" not in node.kwargs
        if not starts and not (inputs and all(item in constant for item in inputs)):
            continue
        if _size(node) > max_bytes:
            continue
        value = _compute(node, constant)
        if value is not None and value.nbytes <= max_bytes:
            constant[node] = value
    for node, value in constant.items():
        if all(user in constant for user in node.users):
            continue
        change = Change(f"computed once: {tuple(value.shape)} {value.dtype}", region.qualified(node), source_of(node))
        name = region.add_buffer(f"constant_{node.name}", value, persistent=False)
        region.replace(node, region.insert_attribute(node, name))
        yield change


def _size(node: fx.Node) -> int:
    meta = node.meta.get("tensor_meta")
    shape, dtype = getattr(meta, "shape", None), getattr(meta, "dtype", None)
    return 0 if shape is None or dtype is None else shape.numel() * dtype.itemsize


def _compute(node: fx.Node, constant: dict[fx.Node, torch.Tensor]) -> torch.Tensor | None:
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), constant.__getitem__)
    with torch.no_grad():
        if node.op == "call_method":
            value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            value = node.target(*args, **kwargs)  # type: ignore[operator]
    # Contiguous memory of its own: an expanded view would be saved and moved as what it is not.
    return value.detach().clone() if isinstance(value, torch.Tensor) and not value.requires_grad else None


def merge_duplicates(region: Region) -> Iterator[Change]:
    """Let the second of two equal pure calls go."""
    sharing = Sharing(region)
    first: dict[Hashable, fx.Node] = {}
    modes = Modes()
    for node in list(region.graph.nodes):
        mode = modes.of(node)  # what was computed without gradients, or in another dtype, is not the same
        if (
            not sharing.is_pure(node)
            or not sharing.is_private(node)
            or any(map(sharing.is_written, node.all_input_nodes))
        ):
            continue
        key = _key(node)
        if key is None:
            continue
        known = first.setdefault((mode, key), node)
        if known is not node:
            what, where, line = f"the same as '{region.qualified(known)}'", region.qualified(node), source_of(node)
            node.replace_all_uses_with(known)
            region.graph.erase_node(node)
            yield Change(what, where, line)


def _key(node: fx.Node) -> Hashable:
    def hashable(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return (type(value).__name__, *map(hashable, value))
        if isinstance(value, dict):
            return tuple((name, hashable(item)) for name, item in sorted(value.items()))
        if isinstance(value, slice):
            return ("slice", *map(hashable, (value.start, value.stop, value.step)))
        return (type(value), value)  # 1, 1.0 and True are equal but not the same argument

    key = (node.op, node.target, hashable(node.args), hashable(dict(node.kwargs)))
    try:
        hash(key)
    except TypeError:
        return None
    return key
