"""Which weights of a program a mask can go on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.fx as fx
from torch import nn

from fxopt.contract import Skip
from fxopt.graph import (
    LAYERS,
    Affine,
    GraphModule,
    Program,
    Region,
    read_affine,
    read_parameter,
    read_product,
    source_of,
    why_not_plain,
)
from fxopt.modules import MASKED_FORMS, FakeQuantize, is_quantized
from passes.sparsify.mask import layer_name

_QUANTIZED = "it is fake-quantised; put sparsify before qat"
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(frozen=True)
class Site:
    """A weight that a mask can go on.

    Attributes:
        name: what reports and targets call it.
        owner: the module that has the parameter.
        leaf: its name there.
        weight: the parameter.
        outputs: the axis of the weight that counts outputs.
        module: the layer that is called, which gives way to one with a mask; None for a function's weight.
        source: the user's line, where it is known.
        groups: of a convolution.
    """

    name: str
    owner: nn.Module
    leaf: str
    weight: nn.Parameter
    outputs: int = 0
    module: nn.Module | None = None
    source: str = ""
    groups: int = 1


def layers(program: Program) -> Iterator[Site | Skip]:
    """The weights of layers of torch.nn, inside opaque parts too, where no graph shows them."""
    inside = set[nn.Module]()
    by_functions = {id(region.attribute(node)) for region in program.regions for node, _ in reads(region)}
    for path, module in program.root.named_modules():
        if module in inside or isinstance(module, GraphModule):
            continue
        source = next((source_of(node) for node in program.sites(module)), "")
        base = next((base for base in (*LAYERS, *MASKED_FORMS) if isinstance(module, base)), None)
        if base is None:
            continue
        inside.update(module.modules())
        reason = _why_not(module, base)
        if reason is not None:
            is_called = program.sites(module) or program.inside_opaque(module)
            if is_called or by_functions.isdisjoint(map(id, module.parameters(recurse=False))):
                yield Skip(path, reason, source)
            continue
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        for inner, owner in module.named_modules():
            for leaf, weight in owner._parameters.items():
                if weight is None or weight.dim() < 2 or not weight.is_floating_point() or leaf.startswith("bias"):
                    continue
                name = layer_name(f"{path}.{inner}" if inner else path, leaf)
                groups = getattr(module, "groups", 1)
                yield Site(name, owner, leaf, weight, int(transposed), module, source, groups)


def _why_not(module: nn.Module, base: type[nn.Module]) -> str | None:
    if base in LAYERS:
        return why_not_plain(module, base)
    if type(module) is not base:
        if is_quantized(module):
            return _QUANTIZED
        # The form that holds masks is a subclass too: it has been here before.
        held = type(module) in MASKED_FORMS.values()
        return "it has masks already" if held else f"its class '{type(module).__name__}' is not {base.__name__} itself"
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return "its 'max_norm' rewrites the weight at each call"
    return why_not_plain(module, base)


def reads(region: Region) -> Iterator[tuple[fx.Node, Site | Skip]]:
    """The weights that functions of a graph use: each read of a parameter that a known function multiplies with."""
    for node in list(region.graph.nodes):
        weight = read_parameter(node, region)
        if weight is None or weight.dim() < 2:
            continue
        used = [found for found in (_use(user, node, region) for user in node.users) if found is not None]
        if not used:
            continue
        path, _, leaf = str(node.target).rpartition(".")
        owner = region.module.get_submodule(path)
        name = layer_name(f"{region.path}.{path}" if region.path and path else region.path or path, leaf)
        refused = next((found for found in used if isinstance(found, str)), None)
        if refused is not None:
            yield node, Skip(name, refused, source_of(node))
        elif isinstance(owner, _CONTAINERS):
            yield node, Skip(name, f"its owner is a {type(owner).__name__}, whose children are its items")
        else:
            axis, groups = next(found for found in used if not isinstance(found, str))
            yield node, Site(name, owner, leaf, weight, axis, None, source_of(node), groups)


def _use(user: fx.Node, weight: fx.Node, region: Region) -> tuple[int, int] | str | None:
    """The axis of outputs and the groups by which `user` takes a weight; a reason where it must be left alone."""
    if user.op == "call_module" and isinstance(region.submodule(user), FakeQuantize):
        return _QUANTIZED
    layer = read_affine(user, region)
    if isinstance(layer, Affine):
        return (layer.channel_axis, layer.groups) if layer.weight_node is weight else None
    product = read_product(user, region)
    if product is not None and product.weight_node is weight:
        return (1 if product.kind == "matmul" else 0), 1
    return None


def is_dense(weight: torch.Tensor) -> bool:
    """Whether a weight is an ordinary tensor, which masks are made for."""
    return weight.layout is torch.strided and not weight.is_quantized
