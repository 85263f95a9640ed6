"""Puts fake quantisers into a graph: on the weights of layers, and on what goes into them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.fx as fx

from fxopt.graph import Affine, Effects, Region, inherit
from fxopt.modules import FakeQuantize, Fused

Make = Callable[[torch.Tensor], FakeQuantize]


def quantize_weight(affine: Affine, make: Callable[[int, torch.Tensor], FakeQuantize], region: Region) -> bool:
    """Quantise the weight of a layer; False where it is already.

    A module is replaced everywhere by its fused form, so that all of its calls use one quantiser; behind a
    parameter that is passed to a function stands a call of its own.
    """
    if affine.module is None:
        return _quantize_parameter(affine, make, region)
    if isinstance(affine.module, Fused) and affine.module.weight_fake_quant is not None:
        return False
    weight = Fused.of(affine.module).scaled_weight().detach()
    fake = make(affine.channel_axis, weight).train(affine.module.training)
    region.program.replace_module(affine.module, Fused.of(affine.module, weight_fake_quant=fake))
    return True


def _quantize_parameter(affine: Affine, make: Callable[[int, torch.Tensor], FakeQuantize], region: Region) -> bool:
    source = affine.weight_node
    assert source is not None
    hint = f"weight_fake_quant.{_flat(str(source.target))}"
    fake = next((user for user in source.users if _calls_fake_quantize(user, region)), None)
    made = make(affine.channel_axis, affine.weight.detach())
    call = _call(affine.node, hint, made, source, region, str(fake.target) if fake is not None else None)
    _set_argument(affine.node, 1, "weight", call)
    return True


class Activations:
    """One quantiser for each distinct value that goes into the layers of a region."""

    def __init__(self, region: Region, make: Make):
        self._region = region
        self._make = make
        self._made: dict[fx.Node, fx.Node] = {}

    def quantize(self, affine: Affine) -> bool:
        """Quantise the input of a layer; False where it is already."""
        value, region = affine.input, self._region
        if _calls_fake_quantize(value, region):
            return False
        fake = self._made.get(value)
        # A value that was written in place since is another value.
        if fake is None or Effects(region).written_between(value, fake, affine.node) is not None:
            named = affine.node if affine.weight_node is None else affine.weight_node
            hint = f"input_fake_quant.{_flat(str(named.target))}"
            fake = _call(affine.node, hint, self._make(affine.weight), value, region)
            self._made[value] = fake
        _set_argument(affine.node, 0, "input", fake)
        return True


def _call(
    before: fx.Node, hint: str, made: FakeQuantize, value: fx.Node, region: Region, known: str | None = None
) -> fx.Node:
    """Insert a call of the quantiser `known`, or of that of the other mode's graph, or of `made`."""
    if known is None and region.mode is not None:
        known = _of_other_mode(hint, region)
    if known is None:
        return inherit(region.insert_module(before, hint, made, (value,)), value)
    with region.graph.inserting_before(before):
        call = region.graph.call_module(known, (value,))
    region.program.note(call, region)
    return inherit(call, value)


def _of_other_mode(hint: str, region: Region) -> str | None:
    """What one mode observes is what the other quantises with: the same site has the same quantiser."""
    used = {str(node.target) for node in region.graph.nodes if node.op == "call_module"}
    container, _, leaf = hint.rpartition(".")
    known = dict(region.module.named_modules()).get(container)
    names = [] if known is None else [n for n in known._modules if n == leaf or n.startswith(f"{leaf}_")]
    return next((f"{container}.{name}" for name in names if f"{container}.{name}" not in used), None)


def _calls_fake_quantize(node: fx.Node, region: Region) -> bool:
    return node.op == "call_module" and isinstance(region.submodule(node), FakeQuantize)


def _set_argument(node: fx.Node, index: int, name: str, value: fx.Node) -> None:
    if len(node.args) > index:
        node.update_arg(index, value)
    else:
        node.update_kwarg(name, value)


def _flat(name: str) -> str:
    return name.replace(".", "_")
