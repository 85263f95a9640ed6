"""Where a node comes from: the user's own line and the module whose forward ran it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.fx as fx


@dataclass(frozen=True)
class Source:
    """A line of the user's code. It prints as `model.py:41`."""

    file: str
    line: int
    function: str = ""

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}"


def source_of(node: fx.Node) -> str:
    """`model.py:41` for the user's line that made `node`, or "" where it is not known."""
    source = node.meta.get("source")
    return str(source) if source is not None else ""


_INHERITED = ("source", "module_path", "tensor_meta")


def inherit(new: fx.Node, *replaced: fx.Node) -> fx.Node:
    """Give `new` the origin of the nodes that it replaces (the last one that knows it wins)."""
    for old in replaced:
        for key in _INHERITED:
            if key in old.meta:
                new.meta[key] = old.meta[key]
    return new
