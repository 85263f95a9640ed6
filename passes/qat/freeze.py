"""quantize-freeze: what was trained or calibrated, in the form that a runtime takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.fx as fx
from torch import nn

from fxopt.contract import Change, Pass, Promise, Skip
from fxopt.errors import PassError
from fxopt.graph import GraphModule, Region, source_of
from fxopt.inputs import Inputs
from fxopt.modules import FakeQuantize, Fused, State, rebuild


@dataclass(frozen=True)
class QuantizeFreeze(Pass):
    """Makes quantisation final: weights lie on their integers' grid, batch norms are folded, no range moves.

        bn( op(x, Q(W s) / s) + b )   =>   op(x, W') + b'     W' = Q(W s)     b' = (b - mean) s + beta

    Outputs stay those of the model in evaluation mode. Quantisers stay too, frozen: they tell a runtime the
    scales. What never observed anything is taken out, since no runtime could know its range.

    Source: Jacob et al. 2018, section 3.2.
    """

    name: ClassVar[str] = "quantize-freeze"
    promise: ClassVar[Promise] = Promise.CLOSE
    after: ClassVar[tuple[str, ...]] = ("clean", "fuse", "qat", "ptq")

    def run(self, region: Region) -> Iterator[Change | Skip]:
        """Freeze the layers first, then what quantises the values between them."""
        calls = [node for node in region.graph.nodes if node.op == "call_module"]
        if region.mode is not None and region.mode is not region.module.training:
            return  # the graph of the other mode calls the same layers
        if region.training:
            if any(_quantises(region.submodule(node)) for node in calls):
                yield Skip(region.path or "the model", "it is in training mode; call .eval() on it before it is frozen")
            return
        for node in calls:
            if region.is_erased(node):
                continue
            module = region.submodule(node)
            if isinstance(module, FakeQuantize):
                yield from _freeze_value(node, module, region)
            elif isinstance(module, Fused) and module.weight_fake_quant is not None:
                yield from _freeze_layer(node, module, module.weight_fake_quant, region)

    def finish(self, module: GraphModule, calibration: Iterable[Inputs]) -> Iterator[Change | Skip]:
        """Refuse a model in which nothing is quantised: whoever freezes it believes that something is."""
        if not any(isinstance(child, FakeQuantize) for child in module.modules()):
            raise PassError(
                "quantize-freeze: nothing is quantised; put 'qat' or 'ptq' before it, and see what these skipped"
            )
        return iter(())


def _quantises(module: nn.Module) -> bool:
    return isinstance(module, FakeQuantize) or (isinstance(module, Fused) and module.weight_fake_quant is not None)


def _freeze_layer(node: fx.Node, module: Fused, fake: FakeQuantize, region: Region) -> Iterator[Change | Skip]:
    where, line = region.qualified(node), source_of(node)
    if fake.state is State.FROZEN:
        return
    with torch.no_grad():
        weight = fake.eval()(module.scaled_weight())
        bias = _folded_bias(module)
    fused = rebuild(module, type(module), weight=weight, bias=bias)
    fused._modules["weight_fake_quant"] = _frozen(fake)
    if module.inner_fake_quant is not None:
        fused._modules["inner_fake_quant"] = _frozen(module.inner_fake_quant)
    norm = fused._modules.pop("bn", None)
    region.program.replace_module(module, fused)
    folded = ", batch norm folded" if norm is not None else ""
    yield Change(f"weight on the grid of int{fake.bits}{folded}", where, line)
    dead = int((weight.flatten(1) == 0).all(1).sum()) if fake.axis == 0 else 0
    if dead:
        yield Skip(where, f"{dead} of its {weight.shape[0]} channels are 0 at int{fake.bits}: they carry nothing", line)


def _folded_bias(module: Fused) -> torch.Tensor | None:
    bn, scale = module.bn, module.folding_scale()
    if bn is None or scale is None or bn.running_mean is None:
        return None if module.bias is None else module.bias.detach()
    bias = -bn.running_mean if module.bias is None else module.bias - bn.running_mean
    return (bias * scale + (bn.bias if bn.affine else 0.0)).detach()


def _freeze_value(node: fx.Node, fake: FakeQuantize, region: Region) -> Iterator[Change | Skip]:
    where = region.qualified(node)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if not fake.ready:
        node.replace_all_uses_with(source)
        region.graph.erase_node(node)
        yield Skip(where, "it never observed anything, so it has no range: what it stood for stays a float")
        return
    if fake.state is not State.FROZEN:
        if not fake.symmetric and bool((fake.minimum == fake.maximum).all()):
            yield Skip(where, f"all that it observed was {float(fake.minimum):.3g}: is its calibration data right?")
        weight = source if source.op == "get_attr" else None
        region.program.replace_module(fake, _frozen(fake))
        yield Change(f"range frozen at {fake.bits} bits", where)
        if weight is not None and isinstance(region.attribute(weight), nn.Parameter):
            with torch.no_grad():
                region.swap_parameter(weight, fake.eval()(region.attribute(weight)))


def _frozen(fake: FakeQuantize) -> FakeQuantize:
    """The same quantiser, at rest: a learned scale is a buffer."""
    made = FakeQuantize(
        fake.bits,
        symmetric=fake.symmetric,
        axis=fake.axis,
        channels=fake.scale.numel(),
        observer="current" if fake.axis is not None else "minmax",
        device=fake.scale.device,
    ).eval()
    for name in ("zero_point", "minimum", "maximum"):
        made.get_buffer(name).copy_(fake.get_buffer(name))
    made.scale.copy_(fake.scale.detach().abs())
    made.ready = fake.ready
    made.state = State.FROZEN
    return made
