"""quantize-freeze: what was trained or calibrated, in the form that a runtime takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.fx as fx
from torch import nn

from fxopt.contract import Change, Pass, Promise, Skip
from fxopt.errors import PassError
from fxopt.graph import GraphModule, Program, Region, behind_mask, source_of
from fxopt.inputs import Inputs
from fxopt.modules import FakeQuantize, Fused, State, held_weight, is_quantized, quantized_weights, rebuild
from fxopt.modules.quantized import SUFFIX

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
        """Freeze the layers first, then what quantises the values between them.

        Raises:
            PassError: where a quantiser only observes.
        """
        calls = [node for node in region.graph.nodes if node.op == "call_module"]
        if region.mode is not None and region.mode is not region.module.training:
            return  # the graph of the other mode calls the same layers
        if region.training:
            inside = [child for node in calls for child in region.submodule(node).modules()]
            if any(isinstance(child, FakeQuantize) for child in inside):
                yield Skip(region.path or "the model", "it is in training mode; call .eval() on it before it is frozen")
            return
        for name, child in region.module.named_modules():
            if isinstance(child, FakeQuantize) and child.state is State.OBSERVE:
                raise PassError(
                    f"quantize-freeze: {name!r} only observes as yet, so the model never ran with its rounding: train "
                    "on until `quantize_from` of its QATSchedule, or `calibrate`"
                )
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
    for path, owner in list(module.named_modules()):
        where = f"{region.qualified(node)}.{path}" if path else region.qualified(node)
        if any(isinstance(child, FakeQuantize) for child in owner._modules.values()):
            yield from _freeze_layer(owner, where, source_of(node), region.program)


def _freeze_layer(owner: nn.Module, where: str, line: str, program: Program) -> Iterator[Change | Skip]:
    fakes = {name: child for name, child in owner._modules.items() if isinstance(child, FakeQuantize)}
    with torch.no_grad():
        shared, own, stays = _on_the_grid(owner, program)
        bias = {"bias": owner.folded_bias()} if isinstance(owner, Fused) else {}
    joined = isinstance(owner, Fused) and owner.bn is not None
    if joined and stays:
        yield Skip(where, "its batch norm is not folded: what else reads its weight takes it as it is", line)
        return
    if not shared and not own and not joined and all(map(_rests, fakes.values())):
        return  # a run before this one froze it: a schedule of training freezes ranges alone
    for leaf, weight in shared.items():
        program.replace_parameter(owner.get_parameter(leaf), weight)
    frozen = rebuild(owner, type(owner), **own, **bias)
    if isinstance(frozen, Fused):
        frozen.reads = ()
    frozen._modules.pop("bn", None)
    for name, fake in fakes.items():
        frozen._modules[name] = _frozen(fake)
        if not fake.ready:
            del frozen._modules[name]
            yield Skip(f"{where}.{name}", _NO_RANGE)
    program.replace_module(owner, frozen)
    widths = " and ".join(dict.fromkeys(f"int{fake.bits}" for _, fake in _weights(owner)))
    how = f"rounded to {widths} at each call, since it is read otherwise too" if stays else f"on the grid of {widths}"
    yield Change(f"weight {how}{', batch norm folded' if joined else ''}", where, line)
    for leaf, fake in _weights(owner):
        rows = frozen.get_parameter(leaf).flatten(1)
        dead = int((rows == 0).all(1).sum()) if fake.axis == 0 and not isinstance(owner, nn.Embedding) else 0
        if dead:
            reason = f"{dead} of its {len(rows)} channels are 0 at int{fake.bits}: they carry nothing"
            yield Skip(where, reason, line)


def _on_the_grid(owner: nn.Module, program: Program) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], bool]:
    """The rounded values of the weights of a layer, for all that read them and for the layer alone.

    A weight that a node reads otherwise, by the name that it has in the layer, stays as it is: its quantiser rounds it
    at each call. The last value says whether there is one.
    """
    shared: dict[str, torch.Tensor] = {}
    own: dict[str, torch.Tensor] = {}
    stays = False
    for leaf, fake in _weights(owner):
        fake.eval()
        held = owner.get_parameter(leaf)
        value: torch.Tensor = owner.folded_weight() if isinstance(owner, Fused) else fake(held_weight(owner, leaf))
        if torch.equal(value, held):
            continue
        readings = [(by_name, torch.equal(seen, value)) for by_name, seen in _readings(held, program)]
        if all(same for _, same in readings):
            shared[leaf] = value
        elif all(same for by_name, same in readings if by_name):
            own[leaf] = value
        else:
            stays = True
    return shared, own, stays


def _readings(parameter: nn.Parameter, program: Program) -> Iterator[tuple[bool, torch.Tensor]]:
    """What each reader of a parameter makes of it, and whether it is a node that reads it by its name."""
    for reader in program.readers(parameter):
        region, by_name = program.region_of(reader), reader.op == "get_attr"
        fakes: list[object] = []
        if not by_name:
            for owner in region.submodule(reader).modules():
                fakes += [
                    owner._modules.get(leaf + SUFFIX) for leaf, held in owner._parameters.items() if held is parameter
                ]
        elif region.attribute(reader) is parameter:
            masked = [user for user in reader.users if behind_mask(user, region) is reader]
            users = [user for each in (reader, *masked) for user in each.users if user not in masked]
            fakes += [region.submodule(user) if user.op == "call_module" else None for user in users]
        for fake in fakes:
            yield by_name, fake.eval()(parameter) if isinstance(fake, FakeQuantize) else parameter


def _rests(fake: FakeQuantize) -> bool:
    return fake.state is State.FROZEN and fake.ready and not fake.learned


def _weights(owner: nn.Module) -> list[tuple[str, FakeQuantize]]:
    return [(leaf, fake) for path, _, leaf, fake in quantized_weights(owner) if not path]


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
    baked = None
    if isinstance(held, nn.Parameter):
        with torch.no_grad():
            rounded = fake.eval()(held)
            same = all(torch.equal(seen, rounded) for _, seen in _readings(held, region.program))
            baked = rounded if same and not torch.equal(rounded, held) else None
    if _rests(fake) and baked is None:
        return
    if not fake.symmetric and bool((fake.minimum == fake.maximum).all()):
        yield Skip(where, f"all that it observed was {float(fake.minimum):.3g}: is its calibration data right?")
    if baked is not None:
        region.swap_parameter(read, baked)
    region.program.replace_module(fake, _frozen(fake))
    yield Change(f"range frozen at {fake.bits} bits", where)


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
