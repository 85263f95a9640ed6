"""clean: the same computation without what has no effect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from fxopt.contract import Change, Pass, Promise, Skip
from fxopt.errors import SpecError
from fxopt.graph import Region, eliminate_dead, source_of
from passes.clean.constants import fold_constants, merge_duplicates
from passes.clean.identity import remove_identity
from passes.clean.shape import simplify


@dataclass(frozen=True)
class Clean(Pass):
    """Removes what has no effect, with outputs equal to the bit.

    Dead code; `nn.Identity`, and dropout in evaluation; casts to the dtype at hand; reshapes of reshapes;
    transposes that undo each other; expressions of constants; and equal calls made twice. Whatever is
    written in place, random, or not known to be harmless stays, and so do the guards of capture.
    """

    name: ClassVar[str] = "clean"
    promise: ClassVar[Promise] = Promise.EXACT

    max_bytes: int = field(default=1 << 20, metadata={"help": "largest constant that is computed once and kept"})

    def __post_init__(self) -> None:
        if self.max_bytes < 0:
            raise SpecError(f"clean: 'max_bytes' is 0 or more, not {self.max_bytes}")

    def run(self, region: Region) -> Iterator[Change | Skip]:
        """Rules in turn, until none of them changes anything."""
        names = {node: (region.qualified(node), source_of(node)) for node in region.graph.nodes}
        for node in eliminate_dead(region):
            if node.op.startswith("call_"):
                yield Change("removed: nothing can see what it does", *names[node])
        changed = True
        while changed:
            changed = False
            for change in self._sweep(region):
                changed = True
                yield change

    def _sweep(self, region: Region) -> Iterator[Change]:
        for node in list(region.graph.nodes):
            for rule in (remove_identity, simplify):
                change = None if region.is_erased(node) else rule(node, region)
                if change is not None:
                    yield change
        eliminate_dead(region)
        if self.max_bytes:
            yield from fold_constants(region, self.max_bytes)
        yield from merge_duplicates(region)
        eliminate_dead(region)
