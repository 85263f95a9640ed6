"""Python code beside a graph: what a layer has taken up is not to be computed a second time where that code runs.

A module that the graph runs through keeps its forward. It can be called by itself, as `model.features(x)` is, and must
then compute what it always did, or say that it can't.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch.fx as fx
from torch import nn

from fxopt.errors import GuardError
from fxopt.graph.module import GraphModule

if TYPE_CHECKING:
    from fxopt.graph.region import Region


@dataclass(frozen=True)
class Absorbed:
    """A node whose work a layer has taken up.

    Attributes:
        region: where both are, or were.
        target: the module that the node called; "" for what is no module.
        caller: the path of the module whose code made the node.
        into: that of the module whose code calls the layer.
        passes_on: whether the node would be right if it passed on its input from now on.
        repeatable: whether nothing changes where it is computed once more.
    """

    region: Region
    target: str
    caller: str
    into: str
    passes_on: bool
    repeatable: bool

    @staticmethod
    def of(node: fx.Node, layer: fx.Node, region: Region, passes_on: bool, repeatable: bool) -> Absorbed:
        """What is to be remembered of a node that is still in the graph."""
        target = str(node.target) if node.op == "call_module" else ""
        return Absorbed(region, target, _caller(node), _caller(layer), passes_on, repeatable)

    def settle(self) -> None:
        """Let the module that was all of the node pass on its input; where there is none, its callers refuse to run."""
        common = _common(self.caller, self.into)
        own = [path for path in _prefixes(self.caller) if len(path) > len(common)]
        gone = next(filter(self._is_gone, [*own, *filter(None, [self.target])]), None) if self.passes_on else None
        if gone is not None:
            own = [path for path in own if len(path) < len(gone)]
            module = self.region.module.get_submodule(gone)
            self.region.program.replace_module(module, nn.Identity().train(module.training))
        else:
            own = [] if self.repeatable else [*_prefixes(self.caller)]
        for path in {*own, *(path for path in _prefixes(self.into) if len(path) > len(common))}:
            self._refuse(path)

    def _is_gone(self, path: str) -> bool:
        """Whether a module is still there, and no graph calls it, runs through it or reads what it holds."""
        program, owner = self.region.program, self.region.module
        module = _find(owner, path)
        if module is None or program.inside_opaque(module) or any(map(program.sites, module.modules())):
            return False
        through = (_caller(node) for region in program.regions if region.module is owner for node in region.graph.nodes)
        if any(each == path or each.startswith(f"{path}.") for each in through):
            return False
        return not any(program.readers(tensor) for tensor in (*module.parameters(), *module.buffers()))

    def _refuse(self, path: str) -> None:
        module = _find(self.region.module, path)
        is_called = module is not None and type(module).forward is not nn.Module.forward
        if module is not None and is_called and not isinstance(module, GraphModule):
            module.__dict__["forward"] = Refusal(self.region.qualified_path(path))


@dataclass(frozen=True)
class Refusal:
    """What a module has for a `forward` that its code does not tell any more."""

    path: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Say so.

        Raises:
            GuardError: always.
        """
        raise GuardError(
            f"'{self.path}' can't be called by itself any more: a pass put some of what its forward computes into a "
            "layer, and only the graph of the whole knows. Call the whole module, or optimize this part of the "
            "original on its own"
        )


def _caller(node: fx.Node) -> str:
    if node.op == "call_module":
        return str(node.target).rpartition(".")[0]
    return str(node.meta.get("module_path", ""))


def _prefixes(path: str) -> Iterator[str]:
    parts = path.split(".") if path else []
    for length in range(1, len(parts) + 1):
        yield ".".join(parts[:length])


def _common(one: str, other: str) -> str:
    return max({"", *_prefixes(one)} & {"", *_prefixes(other)}, key=len)


def _find(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None
