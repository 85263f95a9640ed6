"""Checks of the user's code on values, which an exported model cannot make: it gives outputs, and no errors.

if labels.max() >= 10: raise ValueError(...)   =>   (nothing)     and a reason that says so
"""

from __future__ import annotations

import copy

from fxopt.capture.guards import refuse
from fxopt.contract import Skip
from fxopt.graph import GraphModule, Program, eliminate_dead


def without_checks(module: GraphModule) -> tuple[GraphModule, tuple[Skip, ...]]:
    """`module`, or a copy that refuses no values, and where the checks stand that it lacks."""
    if not any(node.target is refuse for region in Program(module).regions for node in region.graph.nodes):
        return module, ()
    module = copy.deepcopy(module)
    places: dict[str, None] = {}
    for region in Program(module).regions:
        checks = [node for node in region.graph.nodes if node.target is refuse]
        for node in checks:
            places[str(node.args[3])] = None
            region.graph.erase_node(node)
        if checks:
            eliminate_dead(region)
            region.module.recompile()
    return module, (Skip("", f"the exported model takes inputs that the module refuses at {', '.join(places)}"),)
