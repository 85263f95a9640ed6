"""What the operators of one call compute and move, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import flop_registry, sdpa_flop_count, shape_wrapper

from fxopt.bench.watching import Watch


@dataclass(frozen=True)
class Operator:
    """One operator of one call.

    Attributes:
        name: `aten::addmm`.
        flops: a multiply and its add are two; None where torch has no formula for it.
        bytes: of the tensors that it reads and writes; 0 for a view. Of a table that of the rows that it looks up.
    """

    name: str
    flops: int | None
    bytes: int


_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
"""Torch has a formula for attention on CUDA, and none for this."""
_GATHERS = frozenset(getattr(torch.ops.aten, name) for name in ("embedding", "index_select", "index", "gather", "take"))
"""Operators that read of their first argument what they give, and no more."""


def operators_of(call: Callable[[], object]) -> list[Operator]:
    """Make one call and list its operators."""
    listing = _Listing()
    with listing:
        call()
    return listing.found


class _Listing(Watch):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[Operator] = []
        self._formulas = {**flop_registry, _ATTENTION: shape_wrapper(_attention_flops)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = self._formulas.get(func._overloadpacket)
        if formula is None and torch.is_inference_mode_enabled():
            # Here operators that are made of others come whole.
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        flops = None if formula is None else int(formula(*args, **kwargs, out_val=result))
        self.found.append(Operator(func._schema.name, flops, _traffic(func, (args, kwargs), result)))
        return result


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
    return sdpa_flop_count(query, key, value)


def _traffic(func: Any, given: Any, result: Any) -> int:
    read, written = _tensors(given), _tensors(result)
    storages = {tensor.untyped_storage()._cdata for tensor in read}
    views = all(tensor.untyped_storage()._cdata in storages for tensor in written)
    if written and views and not func._schema.is_mutable:
        return 0
    sizes = [tensor.numel() * tensor.element_size() for tensor in [*read, *written]]
    if func._overloadpacket in _GATHERS:
        sizes[0] = min(sizes[0], sizes[-1])
    return sum(sizes)


def _tensors(values: Any) -> list[torch.Tensor]:
    leaves = pytree.tree_leaves(values)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided]
