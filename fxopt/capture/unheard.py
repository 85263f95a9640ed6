"""Hooks on a module that a graph runs through, calling its layers and not itself, are never run: so much is said."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch.fx as fx
from torch import nn

_REGISTRIES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Unheard(OrderedDict[int, Any]):
    """A registry of hooks that warns of the first one of the user's.

    Attributes:
        path: the qualified name of the module that has it; "" once that was warned of.
    """

    path: str = ""

    def __setitem__(self, key: int, hook: Any) -> None:
        """Keep a hook."""
        own = str(getattr(hook, "__module__", "")).partition(".")[0] in ("fxopt", "passes")  # to watch other calls
        if self.path and key not in self and not own:
            path, self.path = self.path, ""
            warnings.warn(
                f"a hook on '{path}' does not run where the captured module is called: its graph calls the layers in "
                f"'{path}', and not '{path}' itself. Register it on one of these layers, or let the forward of the "
                "original return what it is for",
                stacklevel=3,
            )
        super().__setitem__(key, hook)

    def __reduce__(self) -> tuple[Any, ...]:
        return _registry, (list(self.items()), self.path)


def _registry(hooks: Iterable[tuple[int, Any]], path: str) -> Unheard:
    """One that holds hooks already, of which nothing is to be said."""
    registry = Unheard(hooks)
    registry.path = path
    return registry


def warn_of_hooks(root: nn.Module, graphs: Iterable[fx.Graph], path: str) -> None:
    """Let the modules in `root` that `graphs` run through warn of hooks that are registered from now on.

    Args:
        root: what was captured; its own hooks run.
        graphs: its graphs.
        path: its qualified name in what the user captured.
    """
    inside = {str(node.meta.get("module_path", "")) for graph in graphs for node in graph.nodes}
    for name, module in root.named_modules():
        if name and any(each == name or each.startswith(f"{name}.") for each in inside):
            for registry in _REGISTRIES:
                hooks = module.__dict__[registry].items()
                module.__dict__[registry] = _registry(hooks, f"{path}.{name}" if path else name)
