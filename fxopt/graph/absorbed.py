"""Python code beside a graph: what a layer has taken up is not to be computed a second time where that code runs.

A module that the graph runs through keeps its forward. It can be called by itself, as `model.features(x)` is, and must
then compute what it always did, or say that it can't.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Set
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

    def settle(self, run_through: Set[str]) -> None:
        """Let the module that was all of the node pass on its input; where there is none, its callers refuse to run.

        Args:
            run_through: what `run_through` says of the graphs that had the node.
        """
        common = _common(self.caller, self.into)
        own = [path for path in _prefixes(self.caller) if len(path) > len(common)]
        candidates = [path for path in (*own, self.target) if path and path not in run_through]
        gone = next(filter(self._is_gone, candidates), None) if self.passes_on else None
        if gone is not None:
            own = [path for path in own if len(path) < len(gone)]
            module = self.region.module.get_submodule(gone)
            self.region.program.replace_module(module, nn.Identity().train(module.training))
        else:
            own = [] if self.repeatable else [*_prefixes(self.caller)]
        for path in {*own, *(path for path in _prefixes(self.into) if len(path) > len(common))}:
            self._refuse(path)

    def _is_gone(self, path: str) -> bool:
        """Whether a module is still there, and no graph calls it or reads what it holds."""
        program = self.region.program
        module = _find(self.region.module, path)
        if module is None or program.inside_opaque(module) or any(map(program.sites, module.modules())):
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


def run_through(regions: Iterable[Region]) -> Mapping[GraphModule, Set[str]]:
    """For each module with a graph the paths in it of the modules whose code made a node, or ran what made one."""
    callers: dict[GraphModule, set[str]] = defaultdict(set)
    for region in regions:
        callers[region.module].update(map(_caller, region.graph.nodes))
    return {module: {path for caller in paths for path in _prefixes(caller)} for module, paths in callers.items()}


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
