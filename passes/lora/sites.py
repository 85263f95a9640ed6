"""Where adapters can go: every use of a parameter in a graph that a low-rank update has a form for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch.fx as fx
import torch.nn.functional as F
from torch import nn

from fxopt.contract import Skip
from fxopt.graph import LAYERS, Affine, Region, read_affine, read_parameter, read_product, source_of
from fxopt.modules import Fused, Mask, fused_call
from passes.lora import inside
from passes.lora.adapter import Adapter
from passes.lora.forms import Conv, Form, form_of

_LAYERS: Mapping[type[nn.Module], str] = {**LAYERS, nn.Embedding: "embedding"}
_EMBEDDING = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq")


@dataclass(frozen=True)
class Site:
    """One use of a parameter.

    Attributes:
        node: the call; for a weight that is used as a whole, the read of it.
        names: what targets may call it: the layer first, then its parameter.
        slot: qualified name of the parameter.
        weight: the parameter.
        form: how an update of it is applied.
        operator: what it is, for targets: `linear`, `conv2d`, `embedding`, `attention`, `recurrent`, `weight`.
        input: what the layer is applied to; None where the weight is used as a whole.
        bias_slot: that of the bias, where there is one.
        inner: for a weight inside of a module that is called as one, its path there.
    """

    node: fx.Node
    names: tuple[str, ...]
    slot: str
    weight: nn.Parameter
    form: Form
    operator: str
    input: fx.Node | None = None
    bias_slot: str | None = None
    inner: str = ""

    @property
    def name(self) -> str:
        """What reports and files call it."""
        return self.names[0]


@dataclass(frozen=True)
class Left(Skip):
    """A layer that can't be a site.

    Attributes:
        operator: what it is, for targets.
    """

    operator: str = ""


def find_sites(region: Region) -> Iterator[Site | Left]:
    """All sites of a region: weights that are read as a whole, then layers in the order of its graph."""
    uses = {node: read_layer(node, region) for node in region.graph.nodes}
    layouts: dict[str, set[str]] = defaultdict(set)
    for found in uses.values():
        if isinstance(found, Site):
            layouts[found.slot].add(found.form.layout)
    reads = [read for node in region.graph.nodes if (read := _whole_weight(node, region)) is not None]
    # All reads of a parameter are adapted as a whole if one has to be, lest its layers are left out.
    whole = {read.slot for read in reads if not _is_of_layers(read, uses, layouts, region)}
    yield from (read for read in reads if read.slot in whole)
    yield from (left for node in region.graph.nodes if (left := _stored(node, region)) is not None)
    for node, found in uses.items():
        if node.op == "call_module" and inside.is_adaptable(region.submodule(node)):
            yield from _inside(node, region)
        elif node.op == "call_module" and inside.has_no_form(region.submodule(node)):
            module = region.submodule(node)
            kind = "recurrent" if isinstance(module, nn.RNNBase) else "attention"
            reason = f"adapters have no form for '{type(module).__name__}'"
            yield Left(region.qualified(node), reason, source_of(node), kind)
        elif isinstance(found, Skip):
            yield Left(found.where, found.reason, found.source, _operator(node, region))
        elif found is not None and (node.op == "call_module" or found.slot not in whole):
            yield found


def adapter_behind(node: fx.Node, region: Region) -> Adapter | None:
    """The adapter that the value of a layer, or of the read of a weight, goes through."""
    for user, value in uses_of(node, region):
        module = region.submodule(user) if user.op == "call_module" else None
        # The input of a layer is an argument too, and so is the weight where DoRA needs it.
        if isinstance(module, Adapter) and user.args[:2][-1] is value:
            return module
    return None


def uses_of(node: fx.Node, region: Region) -> Iterator[tuple[fx.Node, fx.Node]]:
    """What uses the value of a node, past casts and masks that other passes put in, and which argument that is."""
    for user in node.users:
        masks = user.op == "call_module" and isinstance(region.submodule(user), Mask)
        if masks or (user.op == "call_method" and user.target == "to"):
            yield from uses_of(user, region)
        else:
            yield user, node


def whole_weight(site: Site, region: Region) -> Site:
    """The weight of a layer as a site of its own, where nothing else reads it; a plain linear layer becomes a function.

    F.linear(x, W, b)   =>   F.linear(x, f(W), b)

    That of a convolution stays one of a layer: its factors have other shapes.
    """
    node = site.node
    if isinstance(site.form, Conv):
        return site
    if node.op == "call_module":
        module = region.submodule(node)
        if type(module) is not nn.Linear or site.input is None:
            return site
        read = region.insert_attribute(node, f"{node.target}.weight")
        bias = region.insert_attribute(node, f"{node.target}.bias") if module.bias is not None else None
        # The node stays, since other sites know it as their input.
        node.args, node.kwargs = (node.all_input_nodes[0], read, bias), {}
        node.op, node.target = "call_function", F.linear
    else:
        reads = [each for each in node.all_input_nodes if read_parameter(each, region) is site.weight]
        if len(reads) != 1 or len(reads[0].users) != 1:
            return site
        read = reads[0]
    form = form_of("weight", site.weight.shape, {})
    return Site(read, site.names, site.slot, site.weight, form, site.operator)


def read_layer(node: Any, region: Region) -> Site | Skip | None:
    """The layer that a node calls."""
    if not isinstance(node, fx.Node):
        return None
    if node.op == "call_module" and isinstance(region.submodule(node), nn.Embedding):
        return _embedding_module(node, region)
    affine = read_affine(node, region)
    if isinstance(affine, Affine):
        return _affine(affine, region)
    if isinstance(affine, Skip):
        return None if node.op == "call_function" and "computed" in affine.reason else affine
    return _product(node, region)


def _operator(node: fx.Node, region: Region) -> str:
    if node.op == "call_module":
        module = region.submodule(node)
        return next(kind for layer, kind in _LAYERS.items() if isinstance(module, layer))
    return str(node.kwargs["kind"] if node.target is fused_call else node.target.__name__)  # type: ignore[union-attr]


def _affine(affine: Affine, region: Region) -> Site | Skip:
    node, module = affine.node, affine.module
    if affine.kind.startswith("conv_transpose") and "output_size" in affine.options:
        return Skip(region.qualified(node), "the size of its output is given at the call", source_of(node))
    options = {k: v for k, v in affine.options.items() if k not in ("other", "output_size")}
    if isinstance(options.get("padding"), list):
        options["padding"] = tuple(options["padding"])
    if module is not None and options.get("padding_mode", "zeros") != "zeros":
        options["pad"] = tuple(module._reversed_padding_repeated_twice)  # type: ignore[arg-type]
    if isinstance(module, Fused) and module.bn is not None:
        reason = "a batch norm that trains is fused into it; put lora before fuse"
        return Skip(region.qualified(node), reason, source_of(node))
    assert isinstance(affine.weight, nn.Parameter)
    form = form_of(affine.kind, affine.weight.shape, options)
    slot = _slot(node, "weight", affine.weight_node, region)
    bias = None if affine.bias is None else _slot(node, "bias", affine.bias_node, region)
    return Site(node, _names(slot), slot, affine.weight, form, affine.kind, affine.input, bias)


def _slot(node: fx.Node, leaf: str, read: fx.Node | None, region: Region) -> str:
    name = f"{node.target}.{leaf}" if read is None else str(read.target)
    return f"{region.path}.{name}" if region.path else name


def _names(slot: str) -> tuple[str, ...]:
    owner, _, leaf = slot.rpartition(".")
    return (owner, slot) if leaf == "weight" and owner else (slot,)


def _embedding_module(node: fx.Node, region: Region) -> Site | Skip | None:
    module = region.submodule(node)
    source = node.args[0] if node.args else node.kwargs.get("input")
    if not isinstance(module, nn.Embedding) or not isinstance(source, fx.Node):
        return None
    if type(module).forward is not nn.Embedding.forward:
        reason = f"its class '{type(module).__name__}' overrides 'forward' of Embedding"
        return Skip(region.qualified(node), reason, source_of(node))
    if module.max_norm is not None:
        return Skip(region.qualified(node), "its 'max_norm' rewrites the weight at each call", source_of(node))
    if not isinstance(module.weight, nn.Parameter) or not module.weight.is_floating_point():
        return Skip(region.qualified(node), "its weight is not a floating-point parameter", source_of(node))
    slot = _slot(node, "weight", None, region)
    options = {"padding_idx": module.padding_idx, "scale_grad_by_freq": module.scale_grad_by_freq}
    form = form_of("embedding", module.weight.shape, options)
    return Site(node, _names(slot), slot, module.weight, form, "embedding", source)


def _product(node: fx.Node, region: Region) -> Site | None:
    found = read_product(node, region)
    if found is None:
        return None
    slot = _slot(node, "weight", found.weight_node, region)
    bias_slot = None if found.bias_node is None else _slot(node, "bias", found.bias_node, region)
    options = {}
    if node.target is F.embedding:
        given = {**dict(zip(_EMBEDDING, node.args, strict=False)), **node.kwargs}
        options = {
            "padding_idx": given.get("padding_idx"),
            "scale_grad_by_freq": given.get("scale_grad_by_freq", False),
        }
    form = form_of(found.kind, found.weight.shape, options)
    return Site(node, _names(slot), slot, found.weight, form, found.kind, found.input, bias_slot)


def _whole_weight(node: fx.Node, region: Region) -> Site | None:
    """What `node` reads, as a weight to be adapted as a whole."""
    parameter = read_parameter(node, region)
    if parameter is None or parameter.dim() < 2 or _is_stored(parameter):
        return None
    slot = _slot(node, "weight", node, region)
    owner = region.module.get_submodule(str(node.target).rpartition(".")[0])
    # What transformers calls it where experts have (in, out), and PEFT goes by.
    options = {"transposed": bool(getattr(owner, "is_transposed", False))} if parameter.dim() == 3 else {}
    return Site(node, _names(slot), slot, parameter, form_of("weight", parameter.shape, options), "weight")


def _stored(node: fx.Node, region: Region) -> Left | None:
    """A weight of which a layer computes its own first."""
    value = region.attribute(node) if node.op == "get_attr" else None
    if not isinstance(value, nn.Parameter) or value.dim() < 2 or not _is_stored(value):
        return None
    kind = str(value.dtype).removeprefix("torch.")
    name = _names(_slot(node, "weight", node, region))[0]
    return Left(name, f"its weight is stored as {kind}, which no update can be added to", source_of(node), "weight")


def _is_stored(parameter: nn.Parameter) -> bool:
    return not parameter.is_floating_point() or parameter.itemsize < 2


def _is_of_layers(read: Site, uses: Mapping[fx.Node, Any], layouts: Mapping[str, set[str]], region: Region) -> bool:
    """Whether nothing other than known layers uses what is read, and they see it in one form."""
    one_form = len(layouts[read.slot]) == 1
    return one_form and all(_is_layer_of(user, read.slot, uses, region) for user in read.node.users)


def _is_layer_of(user: fx.Node, slot: str, uses: Mapping[fx.Node, Any], region: Region) -> bool:
    site = uses.get(user)
    if isinstance(site, Site):
        return site.slot == slot
    return user.op == "call_module" and isinstance(region.submodule(user), Adapter)


def _inside(node: fx.Node, region: Region) -> Iterator[Site]:
    module = region.submodule(node)
    for path, owner, parameter in inside.weights(module):
        slot = _slot(node, path, None, region)
        names, kind, layer = _names(slot), "weight", slot.rpartition(".")[0]
        if isinstance(owner, nn.MultiheadAttention):
            names, kind = ((layer, slot) if path.endswith("in_proj_weight") else (slot, layer)), "attention"
        elif isinstance(owner, nn.RNNBase):
            names, kind = (slot, layer), "recurrent"
        elif isinstance(owner, nn.Linear):
            kind = "linear"
            names += (layer.removesuffix(".out_proj"),) if layer.endswith(".out_proj") else ()
        yield Site(node, names, slot, parameter, form_of("weight", parameter.shape, {}), kind, inner=path)
