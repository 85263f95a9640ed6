"""The pass `lora-merge`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from fxopt.contract import Change, Pass, Promise, Skip
from fxopt.graph import Region, source_of
from passes.lora import inside
from passes.lora.adapter import Adapter
from passes.lora.fold import fold, why_not


@dataclass(frozen=True)
class LoRAMerge(Pass):
    """Folds the active adapters into the weights and takes them out of the graph.

        W x + s B (A x)   =>   W' x        W' = W + s B A, computed in float64

    A weight that a layer without an adapter shares stays as it is there. With `keep_zeros` it is
    `W' = W + M * s B A`, where M is 0 wherever W is, so that a sparse weight stays sparse.

    Source: Hu et al. 2021, section 4.2.
    """

    name: ClassVar[str] = "lora-merge"
    promise: ClassVar[Promise] = Promise.CLOSE
    after: ClassVar[tuple[str, ...]] = ("lora",)

    keep_zeros: bool = field(default=False, metadata={"help": "keep weights at zero that are zero"})

    def __post_init__(self) -> None:
        if self.keep_zeros:
            object.__setattr__(self, "promise", Promise.CHANGES)

    def run(self, region: Region) -> Iterator[Change | Skip]:
        """Fold what a call in this graph applies; then bypass the call, or call the plain module."""
        for node in list(region.graph.nodes):
            module = region.submodule(node) if node.op == "call_module" else None
            if isinstance(module, Adapter):
                adapters = [module]
            elif isinstance(module, inside.Adapted):
                children = region.submodule(node).get_submodule(inside.HOLDER).children()
                adapters = [child for child in children if isinstance(child, Adapter)]
            else:
                continue
            reasons = [self._fold(adapter, region) for adapter in adapters]
            source = source_of(node)
            if not any(reasons) and isinstance(module, Adapter):
                node.replace_all_uses_with(node.args[-1] if len(node.args) == 1 else node.args[1])
                region.graph.erase_node(node)
            elif not any(reasons):
                region.program.replace_module(region.submodule(node), inside.plain(region.submodule(node)))
            for adapter, reason in zip(adapters, reasons, strict=True):
                yield Skip(adapter.name, reason, source) if reason else Change(_words(adapter), adapter.name, source)

    def _fold(self, adapter: Adapter, region: Region) -> str | None:
        if adapter.merged:
            return None
        reason = why_not(region.program, adapter, self.keep_zeros)
        if reason is None:
            # All that share a weight are merged together, so that what was tied stays tied.
            program, zeros = region.program, self.keep_zeros
            every = [child for child in program.root.modules() if isinstance(child, Adapter) and not child.merged]
            fold(program.root, [child for child in every if why_not(program, child, zeros) is None], zeros)
        return reason


def _words(adapter: Adapter) -> str:
    active = ", ".join(f"'{name}'" if factor == 1 else f"{factor:g} x '{name}'" for name, factor in adapter.active)
    return f"folded {active or 'no adapter'} into '{adapter.slot}'"
