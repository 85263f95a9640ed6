"""Nodes that change how the nodes behind them run: whether gradients are recorded, and what autocast computes in."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any

import torch
import torch.fx as fx


@fx.has_side_effect
def switch_gradients(enabled: int) -> int:
    """Let autograd record from now on, or not; returns whether it did so far, as 0 or 1.

    A region without gradients is two such calls: the second puts back what the first found. A recording of them stays
    two such calls, since it is asked, as by torch's functions, and a number carries its node there.
    """
    if torch._C._is_torch_function_mode_enabled():
        found: int = torch.overrides.handle_torch_function(switch_gradients, (), enabled)
        return found
    before = torch.is_grad_enabled()
    torch._C._set_grad_enabled(bool(enabled))
    return int(before)


_DEVICES = ("cpu", "cuda")
"""Whose autocast a region may switch."""
_SETTERS = frozenset(
    {
        switch_gradients,
        torch._C._set_grad_enabled,
        torch.amp.autocast_mode._enter_autocast,
        torch.amp.autocast_mode._exit_autocast,
    }
)


def changes_mode(node: fx.Node) -> bool:
    """Whether `node` switches gradients or autocast on or off for the nodes behind it."""
    return node.op == "call_function" and node.target in _SETTERS


def back_on_error(forward: Callable[..., Any], graph: fx.Graph) -> Callable[..., Any]:
    """What runs `graph`, leaving modes as its caller had them where it raises within a region, as `with` does."""
    if not any(map(changes_mode, graph.nodes)):
        return forward

    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # torch.compile cannot trace what follows
            return forward(*args, **kwargs)
        gradients, cached = torch.is_grad_enabled(), torch.is_autocast_cache_enabled()
        autocast = [
            (device, torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in _DEVICES
        ]
        depth = _autocast_depth()
        try:
            return forward(*args, **kwargs)
        except BaseException:
            torch._C._set_grad_enabled(gradients)
            for device, enabled, dtype in autocast:
                torch.set_autocast_enabled(device, enabled)
                torch.set_autocast_dtype(device, dtype)
            torch.set_autocast_cache_enabled(cached)
            for _ in range(_autocast_depth() - depth):
                if torch.autocast_decrement_nesting() == 0:
                    torch.clear_autocast_cache()  # of weights as they were cast
            raise

    return run


def _autocast_depth() -> int:
    """In how many regions of autocast this thread is."""
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


class Modes:
    """Followed through the nodes of a graph, in order: which regions without gradients or with autocast they lie in."""

    def __init__(self) -> None:
        self._open: dict[fx.Node, tuple[Hashable, ...]] = {}

    def of(self, node: fx.Node) -> Hashable:
        """Equal for nodes that run in the same modes."""
        if changes_mode(node):
            ends = node.args[0] if node.args else None
            if isinstance(ends, fx.Node) and ends in self._open:
                del self._open[ends]
            else:
                self._open[node] = (node.target, *map(str, node.args))
        return tuple(self._open.values())


def why_other_mode(start: fx.Node, end: fx.Node) -> str | None:
    """Why what is computed at `start` may differ if it is computed at `end`, which comes later in the same graph."""
    node = start
    while node is not end:
        if changes_mode(node):
            return "gradients or autocast are switched on or off between the two"
        node = node.next
    return None
