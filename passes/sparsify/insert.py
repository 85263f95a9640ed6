"""Puts masks on weights: into the layers that have them, and behind the reads of those that functions use."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch.fx as fx
from torch import nn

from fxopt.contract import Change, Skip
from fxopt.graph import Region, inherit
from fxopt.modules import MASKED_FORMS, Fused, masked_form
from fxopt.modules.mask import SUFFIX
from passes.sparsify.mask import PrunedMask
from passes.sparsify.norm import norm_behind
from passes.sparsify.plan import Plan
from passes.sparsify.sites import Site, is_dense, layers, reads

Wanted = Callable[[str], bool]


class Insertion:
    """Puts the masks of one plan into a region.

    Args:
        region: to edit.
        plan: of the masks.
        wanted: whether a layer of this name is to have one.
        what: of the changes.
    """

    def __init__(self, region: Region, plan: Plan, wanted: Wanted, what: str):
        self._region = region
        self._plan = plan
        self._wanted = wanted
        self._what = what
        self._forms: dict[nn.Module, nn.Module] = {}
        self._known: dict[int, PrunedMask] = {}
        for module in region.program.root.modules():
            for name, child in module._modules.items():
                if isinstance(child, PrunedMask):
                    self._known[id(module._parameters[name.removesuffix(SUFFIX)])] = child

    def run(self) -> Iterator[Change | Skip]:
        """The layers of the whole program first, with its first region; then what the functions of this one use."""
        program = self._region.program
        if self._region is program.regions[0]:
            for layer in list(layers(program)):
                yield from self._layer(layer)
        for node, read in list(reads(self._region)):
            yield from self._read(node, read)

    def _layer(self, site: Site | Skip) -> Iterator[Change | Skip]:
        if isinstance(site, Skip):
            if self._wanted(site.where) and not site.reason.startswith("it has masks"):
                yield site
            return
        mask = self._mask_for(site)
        if not isinstance(mask, PrunedMask):
            yield from mask
            return
        new = id(site.weight) not in self._known
        self._known[id(site.weight)] = mask
        module = site.module
        assert module is not None
        program = self._region.program
        if type(module) not in MASKED_FORMS:
            program.replace_module(module, Fused.of(module, weight_mask=mask))
        else:
            # An earlier weight of the same layer may have put the new form in its place.
            if module not in self._forms:
                self._forms[module] = masked_form(module)
                program.replace_module(module, self._forms[module])
            owner = self._forms[module] if site.owner is module else site.owner
            owner.add_module(site.leaf + SUFFIX, mask)
        if new:
            yield Change(self._what, site.name, site.source)

    def _read(self, node: fx.Node, site: Site | Skip) -> Iterator[Change | Skip]:
        if isinstance(site, Skip):
            if self._wanted(site.where):
                yield site
            return
        region = self._region
        known = self._known.get(id(site.weight))
        if known is None:
            found = self._mask_for(site)
            if not isinstance(found, PrunedMask):
                yield from found
                return
            known = self._known[id(site.weight)] = found
            yield Change(self._what, site.name, site.source)
        site.owner._modules.setdefault(site.leaf + SUFFIX, known)
        with region.graph.inserting_after(node):
            call = region.graph.call_module(f"{node.target}{SUFFIX}", (node,))
        region.program.note(call, region)
        inherit(call, node)
        node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)

    def _mask_for(self, site: Site) -> PrunedMask | list[Skip]:
        """The mask of a site's weight, one for all that share it; or why it has none."""
        if f"{site.leaf}{SUFFIX}" in site.owner._modules or not self._wanted(site.name):
            return []
        if not is_dense(site.weight):
            return [Skip(site.name, "its weight is no ordinary dense tensor", site.source)]
        known = self._known.get(id(site.weight))
        if known is not None:
            return known
        plan = self._plan
        reason = plan.pattern.why_not(site.weight, site.outputs)
        if reason is not None:
            return [Skip(site.name, reason, site.source)]
        made = PrunedMask(site.weight, site.outputs, plan, site.groups).train(self._region.training)
        if plan.criterion == "wanda" and type(site.module) in MASKED_FORMS:
            return [Skip(site.name, "wanda looks at the inputs of linear layers and convolutions only", site.source)]
        if plan.criterion == "bn-scale":
            norm = norm_behind(site.module, self._region.program)
            if isinstance(norm, str):
                return [Skip(site.name, norm, site.source)]
            made.norm.append(norm)
        return made
