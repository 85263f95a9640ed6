"""The pass `sparsify-bake`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from fxopt.capture.state import modes_kept
from fxopt.contract import Change, Pass, Promise, Skip
from fxopt.errors import PassError
from fxopt.graph import GraphModule, Program, Region
from fxopt.modules import MASKED_FORMS, Fused, Mask, rebuild, unmasked_form
from fxopt.rewriting import run_pass
from passes.sparsify.mask import Masked, masked_weights


@dataclass(frozen=True)
class SparsifyBake(Pass):
    """Multiplies the masks into the weights and takes them out of the graph.

        (M W) x   =>   W' x        W' = M W, equal to the bit

    What is left has the classes and the keys of the original: its `state_dict` loads there. A weight without a mask
    trains freely, so a module in training mode keeps them.
    """

    name: ClassVar[str] = "sparsify-bake"
    promise: ClassVar[Promise] = Promise.EXACT
    after: ClassVar[tuple[str, ...]] = ("sparsify",)

    def run(self, region: Region) -> Iterator[Change | Skip]:
        """Bake the whole program with its first region."""
        if region is not region.program.regions[0]:
            return
        program = region.program
        layers = [layer for layer in program.root.modules() if _has_form(layer) and _holds_masks(layer)]
        for each in masked_weights(program.root):
            if region.module.training:
                yield Skip(each.name, "the module trains, and its zeros would not stay; call eval() first")
            else:
                _bake(each, program)
                yield Change(f"{each.mask.sparsity:.1%} zeros baked", each.name)
        for layer in layers:
            _to_plain(layer, program)


def bake(module: nn.Module) -> None:
    """Do what `sparsify-bake` does to a module that was trained, in place and whatever its mode.

    Raises:
        PassError: there are no masks.
    """
    if not masked_weights(module):
        raise PassError("the module has no masks; put them on with the pass 'sparsify' first")
    for child in [child for child in module.modules() if isinstance(child, GraphModule)]:
        with modes_kept(child):
            run_pass(SparsifyBake(), child.eval(), ())


def _bake(each: Masked, program: Program) -> None:
    """Take one mask out."""
    mask = each.mask
    program.replace_parameter(each.weight, torch.where(mask.mask, each.weight.detach(), 0))
    for node in program.sites(mask):
        node.replace_all_uses_with(node.all_input_nodes[0])
        node.graph.erase_node(node)
    program.remove_module(mask)


def _has_form(layer: nn.Module) -> bool:
    return isinstance(layer, Fused) or type(layer) in MASKED_FORMS.values()


def _holds_masks(layer: nn.Module) -> bool:
    return any(isinstance(child, Mask) for child in layer.modules())


def _to_plain(layer: nn.Module, program: Program) -> None:
    """Give a layer the class that it had, where nothing needs the other one."""
    if _holds_masks(layer):
        return
    if not isinstance(layer, Fused):
        program.replace_module(layer, unmasked_form(layer))
    elif layer.is_bare and layer.weight_fake_quant is None:
        plain = next(kind for kind in type(layer).__mro__ if kind.__module__.startswith("torch.nn"))
        made: nn.Module = rebuild(layer, plain)
        for name in ("activation", "adds"):
            made.__dict__.pop(name, None)
        program.replace_module(layer, made)
