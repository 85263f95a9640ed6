"""Calls that return what they are given: `nn.Identity`, and dropout where it does not drop."""

from __future__ import annotations

import torch
import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.contract import Change
from fxopt.graph import Region, source_of, why_not_plain

_DROPOUTS: tuple[type[nn.Module], ...] = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_FUNCTIONS = frozenset(
    getattr(space, name)
    for name in "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout".split()
    for space in (torch, F)
    if hasattr(space, name)
)


def remove_identity(node: fx.Node, region: Region) -> Change | None:
    """identity(x)  =>  x"""
    source = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(source, fx.Node) or not _returns_its_input(node, region):
        return None
    where, line = region.qualified(node), source_of(node)
    node.replace_all_uses_with(source)
    region.graph.erase_node(node)
    return Change("removed: it returns what it is given", where, line)


def _returns_its_input(node: fx.Node, region: Region) -> bool:
    if node.op == "call_function" and node.target in _FUNCTIONS:
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", node.kwargs.get("train", True))
        return region.flag(training) is False
    if node.op != "call_module":
        return False
    module = region.submodule(node)
    if isinstance(module, nn.Identity):
        return why_not_plain(module, nn.Identity) is None
    base = next((kind for kind in _DROPOUTS if isinstance(module, kind)), None)
    if base is None or why_not_plain(module, base) is not None:
        return False
    return not region.training and not module.training
