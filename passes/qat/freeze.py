"""quantize-freeze: what was trained or calibrated, in the form that a runtime takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import nn

from fxopt.contract import Change, Pass, Promise, Skip
from fxopt.errors import PassError
from fxopt.graph import GraphModule, Region, behind_mask, source_of
from fxopt.inputs import Inputs
from fxopt.modules import FakeQuantize, Fused, State, held_weight, is_quantized, quantized_weights, rebuild

_NO_RANGE = "it never observed anything, so it has no range: what it stood for stays a float"


@dataclass(frozen=True)
class QuantizeFreeze(Pass):
    """Makes quantisation final: weights lie on their integers' grid, batch norms are folded, no range moves.

        bn( op(x, Q(W s) / s) + b )   =>   op(x, W') + b'     W' = Q(W s)     b' = (b - mean) s + beta

    Outputs stay those of the model in evaluation mode, which computes the same already. Quantisers stay too, frozen:
    they tell a runtime the scales. What never observed anything is taken out, since no runtime could know its range.

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
            inside = [child for node in calls for child in region.submodule(node).modules()]
            if any(isinstance(child, FakeQuantize) for child in inside):
                yield Skip(region.path or "the model", "it is in training mode; call .eval() on it before it is frozen")
            return
        for node in calls:
            if region.is_erased(node):
                continue
            module = region.submodule(node)
            if isinstance(module, FakeQuantize):
                yield from _freeze_value(node, module, region)
            elif not any(isinstance(child, GraphModule) for child in module.modules()):
                yield from _freeze_inside(node, module, region)

    def finish(self, module: GraphModule, calibration: Iterable[Inputs]) -> Iterator[Change | Skip]:
        """Refuse a model in which nothing is quantised: whoever freezes it believes that something is."""
        if not is_quantized(module):
            mode = "; a model in training mode is left alone by 'ptq': call .eval() on it before"
            raise PassError(
                "quantize-freeze: nothing is quantised; put 'qat' or 'ptq' before it, and see what these skipped"
                + (mode if module.training else "")
            )
        return iter(())


def _freeze_inside(node: fx.Node, module: nn.Module, region: Region) -> Iterator[Change | Skip]:
    """Freeze a layer, or those in a module that is called as one."""
    line = source_of(node)
    for path, owner in list(module.named_modules()):
        where = f"{region.qualified(node)}.{path}" if path else region.qualified(node)
        fakes = {name: child for name, child in owner._modules.items() if isinstance(child, FakeQuantize)}
        if not fakes:
            continue
        with torch.no_grad():
            weights = {leaf: _on_the_grid(owner, leaf, fake) for leaf, fake in _weights(owner)}
            bias = {"bias": owner.folded_bias()} if isinstance(owner, Fused) else {}
        if _is_final(owner, fakes, weights):
            continue
        frozen = rebuild(owner, type(owner), **weights, **bias)
        if isinstance(frozen, Fused):
            frozen.reads = ()
        if isinstance(frozen, nn.RNNBase):
            frozen.__dict__["_flat_weights"] = [getattr(frozen, name) for name in frozen._flat_weights_names]
        norm = frozen._modules.pop("bn", None)
        for name, fake in fakes.items():
            frozen._modules[name] = _frozen(fake)
            if not fake.ready:
                del frozen._modules[name]
                yield Skip(f"{where}.{name}", _NO_RANGE)
        region.program.replace_module(owner, frozen)
        folded = ", batch norm folded" if norm is not None else ""
        widths = " and ".join(dict.fromkeys(f"int{fake.bits}" for _, fake in _weights(owner)))
        yield Change(f"weight on the grid of {widths}{folded}", where, line)
        for leaf, fake in _weights(owner):
            rows = weights[leaf].flatten(1)
            dead = int((rows == 0).all(1).sum()) if fake.axis == 0 and not isinstance(owner, nn.Embedding) else 0
            if dead:
                reason = f"{dead} of its {len(rows)} channels are 0 at int{fake.bits}: they carry nothing"
                yield Skip(where, reason, line)


def _is_final(owner: nn.Module, fakes: Mapping[str, FakeQuantize], weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether a run before this one froze it: a schedule of training freezes ranges alone."""
    joined = isinstance(owner, Fused) and owner.bn is not None
    baked = all(torch.equal(weight, owner.get_parameter(leaf)) for leaf, weight in weights.items())
    return baked and not joined and all(map(_rests, fakes.values()))


def _rests(fake: FakeQuantize) -> bool:
    return fake.state is State.FROZEN and fake.ready and not fake.learned


def _weights(owner: nn.Module) -> list[tuple[str, FakeQuantize]]:
    return [(leaf, fake) for path, _, leaf, fake in quantized_weights(owner) if not path]


def _on_the_grid(owner: nn.Module, leaf: str, fake: FakeQuantize) -> torch.Tensor:
    fake.eval()
    found: torch.Tensor = owner.folded_weight() if isinstance(owner, Fused) else fake(held_weight(owner, leaf))
    return found


def _freeze_value(node: fx.Node, fake: FakeQuantize, region: Region) -> Iterator[Change | Skip]:
    where = region.qualified(node)
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if not fake.ready:
        node.replace_all_uses_with(source)
        region.graph.erase_node(node)
        yield Skip(where, _NO_RANGE)
        return
    read = behind_mask(source, region)
    held: Any = region.attribute(read) if read.op == "get_attr" else None
    with torch.no_grad():
        baked = fake.eval()(held) if isinstance(held, nn.Parameter) else held
    if _rests(fake) and (baked is held or torch.equal(baked, held)):
        return
    if not fake.symmetric and bool((fake.minimum == fake.maximum).all()):
        yield Skip(where, f"all that it observed was {float(fake.minimum):.3g}: is its calibration data right?")
    region.program.replace_module(fake, _frozen(fake))
    yield Change(f"range frozen at {fake.bits} bits", where)
    if baked is not held:
        region.swap_parameter(read, baked)


def _frozen(fake: FakeQuantize) -> FakeQuantize:
    """The same quantiser, at rest: a learned scale is a buffer."""
    made = FakeQuantize(
        fake.bits,
        symmetric=fake.symmetric,
        axis=fake.axis,
        channels=fake.scale.numel(),
        observer="current" if fake.observer == "current" else "minmax",
        device=fake.scale.device,
    ).eval()
    for name in ("zero_point", "minimum", "maximum"):
        made.get_buffer(name).copy_(fake.get_buffer(name))
    made.scale.copy_(fake.step)
    made.ready = fake.ready
    made.state = State.FROZEN
    return made
