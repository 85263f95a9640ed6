"""Merges adapters into the weights, and takes them out again."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fxopt.capture.state import modes_kept, random_state_kept, tensors_kept
from fxopt.errors import ArtifactError, PassError, VerifyError
from fxopt.graph import Program
from fxopt.inputs import Inputs
from fxopt.modules import Fused, Mask
from fxopt.modules.mask import SUFFIX
from fxopt.nested import tensors_in
from fxopt.relative_error import TOLERANCE, relative_error
from passes.lora.active import adapters, root_of
from passes.lora.adapter import Adapter, LayerAdapter
from passes.lora.inside import Adapted
from passes.lora.sites import adapter_behind, uses_of


def merge(module: nn.Module, inputs: Any = None, *, keep_zeros: bool = False) -> None:
    """Fold the active adapters into the weights: `W' = W + s B A`, computed in float64.

    The weights themselves are kept aside, untouched, so that `unmerge` is exact to the bit. A weight that a
    layer without an adapter shares is not changed there. All are merged or none.

    Args:
        module: a captured module with adapters.
        inputs: an example, by which the outputs before and after are compared, in evaluation mode; nothing is compared
            without.
        keep_zeros: `W' = W + M * s B A`, where M is 0 wherever W is: a sparse weight stays sparse.

    Raises:
        PassError: an adapter that no weight can hold; the message says which and why.
        VerifyError: the outputs differ by more than rounding.
    """
    found = [adapter for adapter in adapters(module) if not adapter.merged]
    program = functools.cache(Program)
    for adapter in found:
        reason = why_not(program(root_of(module, adapter)), adapter, keep_zeros)
        if reason is not None:
            raise PassError(f"lora: '{adapter.name}' can't be merged: {reason}")
    before = _outputs(module, inputs)
    fold(module, found, keep_zeros)
    if before is not None and not keep_zeros:
        for old, new in zip(before, _outputs(module, inputs) or (), strict=True):
            error, allowed = relative_error(old, new), TOLERANCE.get(old.dtype, 0.0)
            if error > allowed:
                unmerge(module)
                raise VerifyError(f"lora: merging changes the output by {error:.1e} (allowed {allowed:.0e})")


def unmerge(module: nn.Module) -> None:
    """Put the weights back that `merge` kept aside: the very same ones, moved to where the module is now."""
    back: dict[int, nn.Parameter] = {}
    for adapter in adapters(module):
        if adapter.merged:
            assert adapter.unmerged is not None
            for slot, old in zip((adapter.slot, adapter.bias_slot), adapter.unmerged, strict=True):
                if slot is not None and old is not None:
                    owner, leaf = slot_of(module, adapter, slot)
                    owner._parameters[leaf] = back.setdefault(id(old), _moved(old, owner._parameters[leaf]))
            adapter.merged, adapter.unmerged = False, None


def merged_weights(module: nn.Module, original: nn.Module) -> dict[str, torch.Tensor]:
    """What the original has to load to compute what the merged module does.

    Raises:
        ArtifactError: names of one weight there have several here: the last one loaded would count for all.
    """
    merged, first = module.state_dict(), dict[int, str]()
    for name, parameter in original.named_parameters(remove_duplicate=False):
        one = first.setdefault(id(parameter), name)
        if not torch.equal(merged[one], merged[name]):
            raise ArtifactError(
                f"'{one}' and '{name}' are one weight of the model, and two with the adapter in them, which is not for "
                "both: the model can't load that; give them a weight each, or keep the adapter beside the model"
            )
    return {key: merged[key].clone().contiguous() for key in original.state_dict() if torch.is_tensor(merged[key])}


def fold(module: nn.Module, found: list[Adapter], keep_zeros: bool) -> None:
    """Merge these adapters, of layers whose weights can hold them."""
    new: dict[tuple[int, tuple[Any, ...]], nn.Parameter] = {}
    done: dict[tuple[int, str], nn.Parameter] = {}
    for adapter in found:
        owner, leaf = slot_of(module, adapter)
        weight = done.get((id(owner), leaf), owner._parameters[leaf])
        assert weight is not None
        done[id(owner), leaf] = weight
        key = (id(weight), tuple((id(adapter._modules.get(name)), factor) for name, factor in adapter.active))
        if key not in new:
            new[key] = nn.Parameter(adapter.folded(weight, keep_zeros), requires_grad=weight.requires_grad)
        adapter.unmerged = (weight, None)
        adapter.merged = True
        owner._parameters[leaf] = new[key]
        if any(adapter[name].bias is not None for name, _ in adapter.active) and adapter.bias_slot is not None:
            owner, leaf = slot_of(module, adapter, adapter.bias_slot)
            bias = owner._parameters[leaf]
            assert bias is not None
            adapter.unmerged = (weight, bias)
            owner._parameters[leaf] = nn.Parameter(adapter.folded_bias(bias), requires_grad=bias.requires_grad)


def why_not(program: Program, adapter: Adapter, keep_zeros: bool) -> str | None:
    """What keeps a weight from holding its adapters; None if nothing does."""
    if adapter.batch is not None:
        return "its adapters are disabled, or in a mixed batch; call enable(module) first"
    owner, leaf = slot_of(program.root, adapter)
    others = ", ".join(f"'{name}'" for name in _read_plain(program, owner, leaf))
    if others:
        return f"its weight is read without the adapter by {others}"
    masked = isinstance(owner._modules.get(leaf + SUFFIX), Mask)
    if masked and isinstance(adapter, LayerAdapter) and not keep_zeros:
        return "its weight has a mask, which would drop part of the update; merge with keep_zeros"
    if isinstance(owner, Fused) and owner.weight_fake_quant is not None:
        return "its weight is fake-quantised, and rounding it with the adapter in it gives another weight"
    for name, _ in adapter.active:
        low = adapter[name]
        if low.bias is not None and adapter.bias_slot is None:
            return f"adapter '{name}' has a bias and the layer has none"
        if not adapter.form.is_foldable(low.A):
            return f"adapter '{name}' sees all inputs where the {adapter.form.groups} groups of the layer see their own"
    return None


def _read_plain(program: Program, owner: nn.Module, leaf: str) -> Iterator[str]:
    """The uses of a parameter that go through no adapter of it."""
    weight = owner._parameters[leaf]
    assert weight is not None
    for reader in program.readers(weight):
        region = program.region_of(reader)
        if reader.op == "get_attr":
            path, _, name = str(reader.target).rpartition(".")
            # What is tied under another name is not written.
            mine = region.module.get_submodule(path) is owner and name == leaf
            uses = [use for use, _ in uses_of(reader, region)] if mine else []
        else:
            uses = [reader] if any(child is owner for child in region.submodule(reader).modules()) else []
        for use in uses:
            called = region.submodule(use) if use.op == "call_module" else None
            if isinstance(called, Adapted):
                continue
            found = called if isinstance(called, Adapter) else adapter_behind(use, region)
            if found is None or slot_of(program.root, found) != (owner, leaf):
                yield region.qualified(use)


def slot_of(module: nn.Module, adapter: Adapter, slot: str | None = None) -> tuple[nn.Module, str]:
    """The module and the name there of the parameter that an adapter is for, or of another one."""
    path, _, leaf = (slot or adapter.slot).rpartition(".")
    return root_of(module, adapter).get_submodule(path), leaf


def _moved(parameter: nn.Parameter, like: torch.Tensor | None) -> nn.Parameter:
    """A parameter in the dtype and on the device of another: itself where it is there."""
    if like is None or (parameter.dtype is like.dtype and parameter.device == like.device):
        return parameter
    return nn.Parameter(parameter.detach().to(like), requires_grad=parameter.requires_grad)


@torch.no_grad()
def _outputs(module: nn.Module, inputs: Any) -> list[torch.Tensor] | None:
    """Those in evaluation mode, where nothing is random; the module and the inputs stay as they are."""
    if inputs is None:
        return None
    given = Inputs.of(inputs).map(lambda tensor: tensor.detach().clone())
    with modes_kept(module), tensors_kept(module), random_state_kept():
        return list(tensors_in(given.call(module.eval())))
