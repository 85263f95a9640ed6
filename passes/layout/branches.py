"""Parallel convolutions, batch norms and the input itself, whose sum is taken, as one convolution.

bn(conv3x3(x)) + bn(conv1x1(x)) + bn(x)  =>  conv3x3'(x)

A smaller kernel is one of the larger size with zeros around it; the identity is a kernel with a one in the middle.

Source: Ding et al. 2021, RepVGG, section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.fx as fx
import torch.nn.functional as F

from fxopt.contract import Change, Skip
from fxopt.graph import (
    Affine,
    Effects,
    Norm,
    Region,
    inherit,
    is_norm,
    name_of,
    operands,
    read_affine,
    read_norm,
    reads_sizes,
    replace_values,
    scale_by_output,
    source_of,
    why_shared,
)  # fmt: skip
from passes.layout.reading import identity_of, only_user


@dataclass(frozen=True)
class _Branch:
    """One term of the sum: norm(conv(x)), either of them optional."""

    conv: Affine | None
    norm: Norm | None
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Branches:
    """A sum of branches on one value.

    Attributes:
        root: the last addition.
        largest: the convolution whose kernel holds all the others.
        branches: the terms.
        sums: the additions, from the last to the first.
    """

    root: fx.Node
    largest: Affine
    branches: tuple[_Branch, ...]
    sums: tuple[fx.Node, ...]

    @property
    def dead(self) -> list[fx.Node]:
        """What is left over once the largest computes all of it, from the last to the first."""
        parts = {*self.sums[1:], *(part for branch in self.branches for part in branch.nodes)}
        return sorted(parts - {self.largest.node}, reverse=True)


def find_branches(node: fx.Node, region: Region) -> Branches | Skip | None:
    """The branches whose sum `node` is; a `Skip` where it is one that can't be merged."""
    if name_of(node) != "add":
        return None
    sums: list[fx.Node] = []
    terms = list(_terms(node, region, sums))
    if not all(isinstance(term, fx.Node) for term in terms):
        return None
    found = [_read(term, region) for term in terms]
    inputs = [_input(branch) for branch in found]
    convs = [branch.conv for branch in found if isinstance(branch, _Branch) and branch.conv is not None]
    if len(found) < 2 or not convs:
        return None
    x = convs[0].input
    branches = [
        branch if isinstance(branch, _Branch) and source is x else _Branch(None, None, ()) if term is x else None
        for branch, source, term in zip(found, inputs, terms, strict=True)
    ]
    refused = next((branch for branch in found if isinstance(branch, Skip)), None)
    if any(branch is None for branch in branches):
        return refused if refused is not None and len(convs) + 1 >= len(found) else None
    merged = tuple(branch for branch in branches if branch is not None)
    largest = max(convs, key=lambda conv: conv.weight[0, 0].numel())
    result = Branches(node, largest, merged, tuple(sums))
    reason = _why_not(result, region)
    return result if reason is None else _skip(node, reason, region)


def merge_branches(node: fx.Node, region: Region) -> Change | Skip | None:
    """Merge the branches whose sum `node` is."""
    found = find_branches(node, region)
    if not isinstance(found, Branches):
        return found
    largest = found.largest
    convs = [branch.conv for branch in found.branches if branch.conv is not None]
    reason = next(filter(None, (why_shared(conv, region, [conv.node]) for conv in convs)), None)
    if reason is not None:
        return _skip(node, reason, region)
    parts = [_kernel(branch, largest) for branch in found.branches]
    weight, bias = sum(kernel for kernel, _ in parts), sum(offset for _, offset in parts)
    assert isinstance(weight, torch.Tensor) and isinstance(bias, torch.Tensor)
    reason = replace_values(largest, weight, bias, region)
    if reason is not None:
        return _skip(node, reason, region)
    name = region.qualified(largest.node)
    change = Change(f"{len(found.branches)} branches merged into '{name}'", region.qualified(node), source_of(node))
    region.absorb(node, largest.node, passes_on=False)
    region.replace(node, largest.node)
    inherit(largest.node, *[branch.conv.node for branch in found.branches if branch.conv is largest])
    for part in found.dead:  # a batch norm that asks for its mode would not count as dead
        part.replace_all_uses_with(largest.node)  # by what asks for its sizes
        region.graph.erase_node(part)
    return change


def _terms(node: fx.Node, region: Region, sums: list[fx.Node]) -> Iterator[fx.Node]:
    both = operands(node)
    if both is None or (sums and only_user(node) is None):
        yield node
        return
    sums.append(node)
    for side in both:
        side = identity_of(side, region, sums)
        if name_of(side) == "add" and only_user(side) is not None:
            yield from _terms(side, region, sums)
        else:
            yield side


def _read(term: fx.Node, region: Region) -> _Branch | Skip | None:
    norm = read_norm(term, region) if is_norm(term, region) and only_user(term) is not None else None
    if isinstance(norm, Skip):
        return norm
    inner = term if norm is None else norm.input
    conv = read_affine(inner, region)
    if conv is None and norm is not None:
        return _Branch(None, norm, (term,))
    if isinstance(conv, Affine) and only_user(inner) is not None and conv.is_bare and conv.kind.startswith("conv"):
        return _Branch(conv, norm, (term,) if norm is None else (term, inner))
    return conv if isinstance(conv, Skip) else None


def _input(branch: _Branch | Skip | None) -> fx.Node | None:
    if not isinstance(branch, _Branch):
        return None
    return branch.conv.input if branch.conv is not None else branch.norm.input if branch.norm is not None else None


def _why_not(found: Branches, region: Region) -> str | None:
    branches, largest = found.branches, found.largest
    if region.training:
        return "in training mode each branch learns by itself"
    if largest.is_transposed:
        return "transposed convolutions are not merged"
    for branch in branches:
        conv = branch.conv
        reason = _why_no_identity(largest) if conv is None else _why_other(conv, largest, region)
        if branch.norm is not None and branch.norm.mean.numel() != largest.out_channels:
            reason = f"'{region.qualified(branch.norm.node)}' normalises other channels"
        if reason is not None:
            return reason
    if any(user < largest.node for part in found.dead for user in part.users if reads_sizes(user)):
        return f"a size of a branch is read before '{region.qualified(largest.node)}' runs"
    writer = Effects(region).written_between(largest.input, min(b.nodes[-1] for b in branches if b.nodes), found.root)
    return None if writer is None else f"'{region.qualified(writer)}' writes into the input of the branches"


def _why_no_identity(largest: Affine) -> str | None:
    size, padding = largest.weight.shape[2:], largest.sizes("padding", 0)
    middle = tuple(k // 2 * d for k, d in zip(size, largest.sizes("dilation", 1) or (), strict=True))
    if padding != middle or any(k % 2 == 0 for k in size) or {*(largest.sizes("stride", 1) or ())} != {1}:
        return "the identity is no convolution of that stride, padding and dilation"
    if largest.weight.shape[1] * largest.groups != largest.out_channels:
        return "the identity is no convolution with other channels"
    return None


def _why_other(conv: Affine, largest: Affine, region: Region) -> str | None:
    name = region.qualified(conv.node)
    for option, default in (("stride", 1), ("dilation", 1)):
        size_matters = option == "stride" or conv.weight[0, 0].numel() > 1
        if size_matters and conv.sizes(option, default) != largest.sizes(option, default):
            return f"'{name}' has another {option}"
    if conv.kind != largest.kind or conv.groups != largest.groups:
        return f"'{name}' has other groups"
    if conv.weight.dtype != largest.weight.dtype or conv.weight.shape[:2] != largest.weight.shape[:2]:
        return f"'{name}' has other channels, or another dtype"
    if {conv.options.get("padding_mode", "zeros"), largest.options.get("padding_mode", "zeros")} != {"zeros"}:
        return f"'{name}' pads with other values than zeros"
    padding, wider = conv.sizes("padding", 0), largest.sizes("padding", 0)
    if padding is None or wider is None:
        return f"the padding of '{name}' is given by a word"
    spread, sizes = largest.sizes("dilation", 1) or (), (conv.weight.shape[2:], largest.weight.shape[2:])
    for small, large, p, q, d in zip(*sizes, padding, wider, spread, strict=True):
        if large < small or (large - small) % 2 or q - p != d * (large - small) // 2:
            return f"the kernel of '{name}' does not lie in the middle of the largest"
    return None


def _kernel(branch: _Branch, largest: Affine) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a branch in float64, in the shape of the largest."""
    shape, channels = largest.weight.shape, largest.out_channels
    bias = largest.weight.new_zeros(channels, dtype=torch.float64)
    if branch.conv is None:
        weight = largest.weight.new_zeros(shape, dtype=torch.float64)
        rows = torch.arange(channels, device=weight.device)
        middle = weight.flatten(2)[:, :, weight[0, 0].numel() // 2]  # the sizes are odd
        middle[rows, rows % shape[1]] = 1.0
    else:
        weight = branch.conv.weight.detach().double()
        around = [(large - small) // 2 for large, small in zip(shape[2:], weight.shape[2:], strict=True)]
        weight = F.pad(weight, [size for size in reversed(around) for _ in range(2)])
        bias = bias if branch.conv.bias is None else branch.conv.bias.detach().double()
    if branch.norm is None:
        return weight, bias
    return weight * scale_by_output(branch.norm.scale, largest), bias * branch.norm.scale + branch.norm.shift


def _skip(node: fx.Node, reason: str, region: Region) -> Skip:
    return Skip(region.qualified(node), reason, source_of(node))
