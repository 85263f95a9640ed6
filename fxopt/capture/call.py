"""One example call: its arguments, fresh each time, since a forward may write into them."""

from __future__ import annotations

import copy
import types
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from fxopt.errors import CaptureError
from fxopt.inputs import Inputs
from fxopt.nested import is_shape, tensors_in


@dataclass(frozen=True)
class Call:
    """Arguments of one call of a module; `static` as in `Inputs`."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    static: Collection[str | int] = ()

    @property
    def static_tensors(self) -> list[torch.Tensor]:
        """Those of `static` arguments."""
        return Inputs(self.args, self.kwargs, self.static).static_tensors

    def fresh(self) -> Call:
        """Copies that a forward may write into; what can't be copied is shared.

        A tensor that was given twice is two tensors: another call may give others.
        """
        both = (self.args, dict(self.kwargs))
        if not any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(both)):
            # Not a tensor with a history, nor whatever an object of the user's raises.
            with suppress(Exception):
                return self._with(copy.deepcopy(both))
        memo: dict[int, Any] = {}
        return self._with(pytree.tree_map(lambda leaf: _copied(leaf, memo), both, is_leaf=is_shape))

    def _with(self, both: Any) -> Call:
        args, kwargs = _apart(both)
        return Call(args, kwargs, self.static)

    def run(self, module: nn.Module) -> Any:
        """Call `module` with fresh arguments."""
        fresh = self.fresh()
        return module(*fresh.args, **fresh.kwargs)

    def check(self, module: nn.Module) -> None:
        """Refuse arguments that can be read once only, and what shows none of its operators at all.

        Raises:
            CaptureError: naming the argument, or the kind of module.
        """
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError(
                f"'{type(module).__name__}' is TorchScript, whose operators can't be seen: give the module that was "
                "scripted or traced, or one that calls this, which stays opaque in it"
            )
        for name, value in (*enumerate(self.args), *self.kwargs.items()):
            for leaf in pytree.tree_leaves(value):
                if isinstance(leaf, (types.GeneratorType, map, filter, zip)):
                    raise CaptureError(
                        f"input {name!r} of '{type(module).__name__}' is a {type(leaf).__name__}, which can be read "
                        "only once; capture runs the module more than once: give a list"
                    )


def _apart(value: Any) -> Any:
    met: set[int] = set()

    def own(tensor: torch.Tensor) -> torch.Tensor:
        is_first = id(tensor) not in met
        met.add(id(tensor))
        return tensor if is_first else _copied(tensor, {})

    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    if len({*map(id, tensors)}) == len(tensors):
        return value
    return pytree.tree_map_only(torch.Tensor, own, value, is_leaf=is_shape)


def _copied(leaf: Any, memo: dict[int, Any]) -> Any:
    if id(leaf) not in memo:
        if isinstance(leaf, torch.Tensor):
            memo[id(leaf)] = leaf.detach().clone().requires_grad_(leaf.requires_grad)
        else:
            for tensor in tensors_in(leaf):
                _copied(tensor, memo)
            try:
                memo[id(leaf)] = copy.deepcopy(leaf, memo)
            except Exception:
                memo[id(leaf)] = leaf
    return memo[id(leaf)]
