"""Puts fake quantisers into a graph: on the weights of layers, and on what goes into them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.fx as fx

from fxopt.graph import Affine, Effects, Region, behind_mask, inherit
from fxopt.modules import FakeQuantize, Fused

Make = Callable[[torch.Tensor], FakeQuantize]
MakeWeight = Callable[[int | None, torch.Tensor], FakeQuantize]


def quantize_weight(affine: Affine, make: MakeWeight, region: Region) -> bool:
    """Quantise the weight of a layer; False where it is already.

    A module is replaced everywhere by its fused form, so that all of its calls use one quantiser; behind a
    parameter that is passed to a function stands a call of its own.
    """
    if affine.module is None:
        assert affine.weight_node is not None
        quantize_parameter(affine.weight_node, affine.node, affine.channel_axis, make, region)
        return True
    if isinstance(affine.module, Fused) and affine.module.weight_fake_quant is not None:
        return False
    weight = Fused.of(affine.module).scaled_weight().detach()
    fake = make(affine.channel_axis, weight).train(affine.module.training)
    region.program.replace_module(affine.module, Fused.of(affine.module, weight_fake_quant=fake))
    return True


def quantize_parameter(source: fx.Node, reader: fx.Node, axis: int | None, make: MakeWeight, region: Region) -> None:
    """Let `reader` read what `source` reads, or masks, through a quantiser, the same one for each axis."""
    hint = f"weight_fake_quant.{_flat(str(source.target))}"
    made = make(axis, region.attribute(behind_mask(source, region)).detach())
    known = next((str(user.target) for user in source.users if _quantizes_along(user, made.axis, region)), None)
    reader.replace_input_with(source, _call(reader, hint, made, source, region, known))


class Activations:
    """One quantiser for each distinct value that goes into the layers of a region."""

    def __init__(self, region: Region, make: Make):
        self._region = region
        self._make = make
        self._made: dict[fx.Node, fx.Node] = {}

    def quantize(self, node: fx.Node, value: fx.Node, index: int, name: str, like: torch.Tensor, hint: str) -> bool:
        """Quantise an argument of `node`; False where it is already.

        Args:
            node: what reads it.
            value: the argument.
            index: its place among the arguments.
            name: its name there.
            like: a tensor on the device of the quantiser.
            hint: what the quantiser is named after.
        """
        region = self._region
        if calls_fake_quantize(value, region):
            return False
        fake = self._made.get(value)
        # A value that was written in place since is another value.
        if fake is None or Effects(region).written_between(value, fake, node) is not None:
            fake = _call(node, f"input_fake_quant.{_flat(hint)}", self._make(like), value, region)
            self._made[value] = fake
        if len(node.args) > index:
            node.update_arg(index, fake)
        else:
            node.update_kwarg(name, fake)
        return True


def _call(
    before: fx.Node, hint: str, made: FakeQuantize, value: fx.Node, region: Region, known: str | None = None
) -> fx.Node:
    """Insert a call of the quantiser `known`, or of that of the other mode's graph, or of `made`."""
    known = known or name_of_other_mode(hint, region)
    if known is None:
        return inherit(region.insert_module(before, hint, made, (value,)), value)
    with region.graph.inserting_before(before):
        call = region.graph.call_module(known, (value,))
    region.program.note(call, region)
    return inherit(call, value)


def name_of_other_mode(hint: str, region: Region) -> str | None:
    """The quantiser that the other mode's graph has at this site: what one observes is what the other rounds by."""
    if region.mode is None:
        return None
    container, _, leaf = hint.rpartition(".")
    known = region.module._modules.get(container)
    for name, fake in known.named_children() if known is not None else ():
        if (name == leaf or name.startswith(f"{leaf}_")) and all(
            site.graph is not region.graph for site in region.program.sites(fake)
        ):
            return f"{container}.{name}"
    return None


def calls_fake_quantize(node: fx.Node, region: Region) -> bool:
    """Whether the value is what a quantiser gives."""
    return node.op == "call_module" and isinstance(region.submodule(node), FakeQuantize)


def _quantizes_along(node: fx.Node, axis: int | None, region: Region) -> bool:
    fake = region.submodule(node) if node.op == "call_module" else None
    return isinstance(fake, FakeQuantize) and fake.axis == axis


def _flat(name: str) -> str:
    return name.replace(".", "_")
