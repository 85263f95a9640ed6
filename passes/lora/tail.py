"""Takes apart a layer that an activation or an addition was fused into: an update goes between."""

from __future__ import annotations

import operator

import torch
import torch.fx as fx
import torch.nn.functional as F

from fxopt.graph import Region, inherit
from fxopt.modules import Activation, Fused, fused_call, rebuild


def loosen(node: fx.Node, region: Region) -> fx.Node:
    """The call of the affine map alone; what was fused behind it, at all of its calls, becomes calls of its own.

    act(W x + b + other)   =>   act((W x + b) + other)
    """
    if node.target is fused_call:
        return _loosen_function(node, region)
    if node.op != "call_module":
        return node
    module = region.submodule(node)
    if not isinstance(module, Fused) or module.is_bare:
        return node
    bare = rebuild(module, type(module))
    bare.activation, bare.adds = None, False
    sites = region.program.sites(module)
    region.program.replace_module(module, bare)
    for site in sites:
        _expose(site, region.program.region_of(site), module.activation, module.adds)
    return node


def _expose(site: fx.Node, region: Region, activation: Activation | None, adds: bool) -> None:
    last = site
    if adds:
        other = site.kwargs.get("other", site.args[1] if len(site.args) > 1 else None)
        site.args = site.args[:1]
        site.kwargs = {key: value for key, value in site.kwargs.items() if key != "other"}
        last = _behind(last, region, operator.add, (last, other))
    if activation is not None:
        _behind(last, region, apply, (last, activation.name, activation.arguments))


def _loosen_function(node: fx.Node, region: Region) -> fx.Node:
    options = dict(node.kwargs)
    other, activation = options.pop("other", None), str(options.pop("activation"))
    arguments = options.pop("arguments")
    node.target, node.kwargs = getattr(F, str(options.pop("kind"))), options
    last = node if other is None else _behind(node, region, operator.add, (node, other))
    _behind(last, region, apply, (last, activation, arguments))
    return node


def _behind(last: fx.Node, region: Region, function: object, args: tuple[object, ...]) -> fx.Node:
    with region.graph.inserting_after(last):
        node = region.graph.call_function(function, args)  # type: ignore[arg-type]
    inherit(node, last)
    last.replace_all_uses_with(node, delete_user_cb=lambda user: user is not node)
    return node


def apply(value: torch.Tensor, name: str, arguments: tuple[tuple[str, object], ...]) -> torch.Tensor:
    """The activation that was fused, in the memory of its input: nothing else reads that."""
    return Activation(name, arguments).apply_(value)
