"""The batch norm behind a layer, whose scale says what each output channel is worth (Liu et al. 2017)."""

from __future__ import annotations

from torch import nn

from fxopt.graph import Program
from fxopt.modules import Fused

_BatchNorm = nn.modules.batchnorm._BatchNorm


def norm_behind(layer: nn.Module | None, program: Program) -> nn.Module | str:
    """The batch norm that alone reads the output of `layer`, or why there is none."""
    if layer is None:
        return "bn-scale needs a layer that is a module, with a batch norm behind it"
    if isinstance(layer, Fused) and layer.bn is not None:
        return layer.bn if layer.bn.affine else "the batch norm behind it has no scale"
    found = set[nn.Module]()
    for site in program.sites(layer):
        region = program.region_of(site)
        for user in site.users:
            module = region.submodule(user) if user.op == "call_module" else None
            if not isinstance(module, _BatchNorm):
                return f"'{user.name}' reads its output, no batch norm: bn-scale has nothing to go by"
            found.add(module)
    if len(found) != 1:
        return "there is no batch norm behind it (a folded one has left no scale): bn-scale has nothing to go by"
    norm = found.pop()
    return norm if norm.affine else "the batch norm behind it has no scale"
