"""Whether something else would notice that a layer was rewritten."""

from __future__ import annotations

import torch.fx as fx

from fxopt.graph.affine import Affine
from fxopt.graph.region import Region
from fxopt.graph.source import source_of


def also_used(node: fx.Node, region: Region) -> str | None:
    """Why the value of `node` is not the business of one user alone; None where it is."""
    users = list(node.users)
    if len(users) == 1 and users[0].op != "output":
        return None
    names = ", ".join(repr(region.qualified(user)) for user in users) or "nothing"
    return f"the output of '{region.qualified(node)}' is used by {names}"


def why_called_elsewhere(affine: Affine, region: Region, sites: list[fx.Node]) -> str | None:
    """Why a call other than `sites` would see another layer in the place of this one; None if there is none."""
    if affine.module is None:
        return None
    name = region.qualified(affine.node)
    if region.program.inside_opaque(affine.module):
        return f"the Python code around '{name}' may call it, unseen by the graph"
    for site in region.program.sites(affine.module):
        if site in sites:
            continue
        other = region.program.region_of(site)
        if other is not region and other.module is region.module:
            mode = "training" if other.mode else "evaluation"
            return f"'{name}' is called in {mode} mode too, whose graph would not see the change"
        return f"'{name}' is also called at {source_of(site) or repr(site.name)}"
    return None


def why_shared(affine: Affine, region: Region, sites: list[fx.Node]) -> str | None:
    """Why new values for the parameters of a layer would show elsewhere, or undo a tie; None if they don't."""
    reason = why_called_elsewhere(affine, region, sites)
    if reason is not None:
        return reason
    own = {*sites, affine.weight_node, affine.bias_node}
    for tensor, read in ((affine.weight, affine.weight_node), (affine.bias, affine.bias_node)):
        if tensor is None:
            continue
        readers = [reader for reader in region.program.readers(tensor) if reader not in own]
        readers += [user for user in read.users if user not in own] if read is not None else []
        if readers:
            others = ", ".join(repr(region.program.region_of(reader).qualified(reader)) for reader in readers)
            return f"the parameters of '{region.qualified(affine.node)}' are tied: {others} read them too"
    return None
