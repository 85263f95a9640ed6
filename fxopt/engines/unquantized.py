"""A quantised module as it would be in floats: what its integers are measured beside."""

from __future__ import annotations

from typing import cast

from torch import nn

from fxopt.capture.independent import independent_copy
from fxopt.graph import GraphModule, Program
from fxopt.modules import FakeQuantize, Fused


def unquantized(module: GraphModule) -> GraphModule:
    """A copy of `module` without its quantisers; weights that freezing put on a grid stay there."""
    found = cast(GraphModule, independent_copy(module))
    for region in Program(found).regions:
        for node in list(region.graph.nodes):
            if node.op == "call_module" and isinstance(region.submodule(node), FakeQuantize):
                region.replace(node, node.args[0])
    for owner in list(found.modules()):
        for name, child in list(owner._modules.items()):
            if isinstance(child, FakeQuantize) and isinstance(owner, Fused):
                del owner._modules[name]
                owner.reads = ()
            elif isinstance(child, FakeQuantize):
                owner._modules[name] = nn.Identity().eval()
    return found
