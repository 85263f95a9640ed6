"""Linear layers of a quantised module as products of integers."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.fx as fx
import torch.nn.functional as F

from fxopt.contract import Skip
from fxopt.engines.binding import named
from fxopt.engines.cublas.candidate import Candidate, Kernel
from fxopt.graph import Effects, GraphModule, Program, Region, source_of
from fxopt.modules import FakeQuantize, Fused, FusedLinear
from fxopt.modules.functional import tail
from fxopt.modules.quantized import quantized_weights
from fxopt.modules.stored import StoredWeight

_MULTIPLE = 8
_FEWEST_ROWS = 17
"""cuBLASLt takes no fewer."""
_BYTE = 8


def candidates(root: GraphModule) -> Iterator[Candidate | Skip]:
    """Its quantised layers, and why any cannot be multiplied as integers.

    Args:
        root: a copy over the same tensors, whose nodes have shapes in their metadata.
    """
    called = set()
    for region in Program(root).regions:
        for node in list(region.graph.nodes) if region.mode is not True else ():
            owner = region.submodule(node) if node.op == "call_module" else None
            if isinstance(owner, Fused) and owner.weight_fake_quant is not None:
                called.add(owner)
                yield _read(node, owner, region)
    for path, owner, leaf, _ in quantized_weights(root):
        if owner not in called and not isinstance(owner, Fused):
            yield Skip(path, f"{leaf} runs in floats: there is no integer kernel for {type(owner).__name__}")


def _read(node: fx.Node, owner: Fused, region: Region) -> Candidate | Skip:
    source, value = node.args[0], owner.input_fake_quant
    if value is None and isinstance(source, fx.Node) and source.op == "call_module":
        held = region.submodule(source)
        source, value = (source.args[0], held) if isinstance(held, FakeQuantize) else (source, None)

    def skip(reason: str) -> Skip:
        return Skip(region.qualified(node), f"it runs in floats: {reason}", source_of(node))

    weight = owner.weight_fake_quant
    if not isinstance(owner, FusedLinear) or weight is None:
        return skip("cuBLASLt multiplies matrices, and this is a convolution")
    if not isinstance(value, FakeQuantize) or not isinstance(source, fx.Node):
        return skip("its input is not quantised")
    reason = _why_not(owner, weight, value)
    meta = source.meta.get("tensor_meta")
    if reason is not None or meta is None:
        return skip(reason or "the example never reaches it")
    if source is not node.args[0] and Effects(region).written_between(source, node.args[0], node):  # type: ignore[arg-type]
        return skip("what it multiplies is written to after it was quantised")
    kernel = int8_linear(owner, weight, value)
    others = [arg for arg in (*node.args[1:], *node.kwargs.values()) if isinstance(arg, fx.Node)]
    given = tuple(torch.randn(each.meta["tensor_meta"].shape).to(owner.weight) for each in (source, *others))

    def put() -> None:
        # Read anew: what it is applied to may be a layer that was put already.
        rounded, *rest = (arg for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, fx.Node))
        held = value is not owner.input_fake_quant
        with region.graph.inserting_before(node):
            given = (rounded.args[0] if held else rounded, *rest)
            call = region.graph.call_function(named(kernel, node.name), given)
        node.replace_all_uses_with(call)
        region.graph.erase_node(node)
        if held and not rounded.users:
            region.graph.erase_node(rounded)

    # A module that is called twice is two places.
    key = f"{region.path}.{node.name}" if region.path else node.name
    return Candidate(key, skip, kernel, _floats(owner, weight, value), given, put)


def _why_not(owner: FusedLinear, weight: FakeQuantize, value: FakeQuantize) -> str | None:
    if owner.bn is not None:
        return "it holds a batch norm: run 'quantize-freeze', which folds it"
    if not (weight.ready and value.ready):
        return "a quantiser never observed anything: calibrate, or run 'quantize-freeze'"
    if max(weight.bits, value.bits) > _BYTE:
        return f"integers of {max(weight.bits, value.bits)} bits, and products take {_BYTE}"
    if not weight.symmetric or weight.axis not in (None, 0) or value.axis is not None:
        return "products take symmetric weights with one range an output, and values with one range"
    if owner.in_features % _MULTIPLE or owner.out_features % _MULTIPLE:
        sizes = f"{owner.in_features} to {owner.out_features}"
        return f"products take features that are multiples of {_MULTIPLE}, here they are {sizes}"
    return None


@torch.no_grad()
def int8_linear(owner: FusedLinear, quantizer: FakeQuantize, value: FakeQuantize) -> Kernel:
    """What a quantised layer computes, with its input as given and the product in integers.

        y = sx sw (q(x) - z) q(w) + b = sx sw (q(x) q(w)) + (b - sx sw z sum(q(w)))

    Unsigned values are moved by 128, since the operator takes signed ones alone (Jacob et al. 2018, section 2).
    """
    stored = StoredWeight(quantizer, owner.scaled_weight())
    weight, moved = stored.stored, 0 if value.symmetric else 2 ** (_BYTE - 1)
    low, high = value.low - moved, value.high - moved
    inverse, zero = 1 / value.scale.detach().abs(), value.zero_point.float() - moved
    scale = (stored.scale / inverse).expand(len(weight)).contiguous()
    offset = -zero * scale * weight.sum(1, dtype=torch.int32)
    if owner.bias is not None:
        offset = offset + owner.bias.detach().float()
    width, inner, activation = weight.shape[1], owner.inner_fake_quant, owner.activation

    def run(x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        places = torch.round(x.float() * inverse).add_(zero).clamp_(low, high).to(torch.int8).reshape(-1, width)
        rows = len(places)
        if rows < _FEWEST_ROWS:
            places = F.pad(places, (0, 0, 0, _FEWEST_ROWS - rows))
        product = torch._int_mm(places.contiguous(), weight.t())[:rows]
        found = torch.addcmul(offset, product.float(), scale).to(x.dtype).reshape(*x.shape[:-1], len(weight))
        return tail(found if inner is None else inner(found), other, activation)

    return run


@torch.no_grad()
def _floats(owner: FusedLinear, quantizer: FakeQuantize, value: FakeQuantize) -> Kernel:
    """The same in floats: with the input rounded in each call, and the weight once."""
    weight, inner, activation = quantizer(owner.scaled_weight()), owner.inner_fake_quant, owner.activation

    def run(x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        found = F.linear(value(x), weight, owner.bias)
        return tail(found if inner is None else inner(found), other, activation)

    return run
