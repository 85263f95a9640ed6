"""Puts adapters into a graph."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
import torch.fx as fx
from torch import nn

from fxopt.contract import Change, Skip
from fxopt.graph import Region, inherit, source_of
from fxopt.modules import Fused
from passes.lora import inside
from passes.lora.adapter import Adapter, LayerAdapter, LowRank, WeightAdapter
from passes.lora.forms import Embedding, Form
from passes.lora.init import MOVES_WEIGHT, Recipe, can_take_out, start
from passes.lora.sites import Left, Site, adapter_behind, find_sites, read_layer, whole_weight
from passes.lora.slices import why_not_sliced
from passes.lora.tail import loosen

Choose = Callable[[tuple[str, ...], Collection[str], nn.Parameter], "Recipe | None"]


class Insertion:
    """Adds one adapter to all weights of a region that are chosen, wherever they are used.

    Args:
        region: to edit.
        adapter: the name of the new adapter.
        choose: what a layer of these names, these operators and this weight gets, or None for nothing.
        ties: whether layers of a tied weight have one adapter together, or each its own.
    """

    def __init__(self, region: Region, adapter: str, choose: Choose, *, ties: bool = True):
        self._region = region
        self._adapter = adapter
        self._choose = choose
        self._ties = ties
        self._known: dict[int | str, list[Adapter]] = {}
        self._now: dict[fx.Node, fx.Node] = {}
        container = region.module._modules.get(inside.HOLDER)
        children = container.named_children() if isinstance(container, nn.Module) else ()
        self._calls = {child: f"{inside.HOLDER}.{name}" for name, child in children}
        for module in region.program.root.modules():
            if isinstance(module, Adapter):
                self._remember(module)

    def run(self) -> Iterator[Change | Skip]:
        """First the layers that have other adapters already, then those that have none."""
        for module in list(self._region.module.modules()):
            recipe = self._recipe_beside(module)
            if isinstance(recipe, Skip):
                yield recipe
            elif isinstance(module, Adapter) and recipe is not None:
                yield self._extend(module, recipe)
        for sites in self._sites():
            meant = self._meant(sites)
            if isinstance(meant, Skip):
                yield meant
            elif isinstance(sites, list) and meant is not None:
                yield from (self._insert(site, sites, meant) for site in list(sites))

    def refused(self) -> Iterator[Skip]:
        """What `run` would leave alone though it is chosen. Nothing is changed."""
        for found in (*map(self._recipe_beside, self._region.module.modules()), *map(self._meant, self._sites())):
            if isinstance(found, Skip):
                yield found

    def hand_on_weight(self, adapter: Adapter) -> None:
        """Let all calls of an adapter give it the weight and the bias of the layer, which DoRA needs."""
        for call, region in self._calls_without_weight(adapter):
            site = read_layer(call.args[1], region)
            assert isinstance(site, Site)
            call.args = (*call.args, *_reads(call, site, region))

    def why_no_weight(self, adapter: Adapter) -> str | None:
        """What keeps the calls of an adapter from giving it the weight; None if nothing does."""
        calls = self._calls_without_weight(adapter)
        if all(isinstance(read_layer(call.args[1], region), Site) for call, region in calls):
            return None
        return "it was made without DoRA, and what a later pass put in hides its layer, whose weight DoRA needs"

    def _sites(self) -> list[list[Site] | Left]:
        """All uses of one parameter that have no adapter yet, together."""
        by_slot: dict[str, list[Site]] = {}
        left: list[list[Site] | Left] = []
        for site in find_sites(self._region):
            if isinstance(site, Left):
                left.append(site)
            elif not self._has_adapter(site):
                by_slot.setdefault(site.slot, []).append(site)
        return [*left, *by_slot.values()]

    def _meant(self, sites: list[Site] | Left) -> Recipe | Skip | None:
        """One parameter is adapted at all of its uses or at none: its weight can't hold an update for some."""
        if isinstance(sites, Left):
            chosen = self._choose((sites.where,), (sites.operator,), nn.Parameter(torch.empty(0)))
            return None if chosen is None else Skip(sites.where, sites.reason, sites.source)
        recipe = self._choose(*_named(sites), sites[0].weight)
        if recipe is None:
            return None
        reasons = ((site, self._why_not(site, sites, recipe)) for site in sites)
        return next((Skip(site.name, why, source_of(site.node)) for site, why in reasons if why is not None), recipe)

    def _recipe_beside(self, module: nn.Module) -> Recipe | Skip | None:
        """What an adapter gets beside those that it has."""
        if not isinstance(module, Adapter) or self._adapter in module:
            return None
        weight = self._region.program.root.get_parameter(module.slot)
        recipe = self._choose(module.targets, module.operators, weight)
        if recipe is None:
            return None
        reason = self._why_not_shared(module.form, module.slot, recipe)
        if reason is None and recipe.init in MOVES_WEIGHT:
            beside = ", ".join(f"'{name}'" for name in module.names)
            reason = f"init '{recipe.init}' would change its weight, which adapter {beside} is for"
        if reason is None and recipe.dora:
            reason = self.why_no_weight(module)
        return recipe if reason is None else Skip(module.name, reason)

    def _extend(self, module: Adapter, recipe: Recipe) -> Change:
        made = self._factors(module.form, module.slot, recipe)
        if recipe.dora:
            self.hand_on_weight(module)
        module.add_module(self._adapter, made.train(module.training))
        return Change(f"{_words(recipe, made)}, beside {', '.join(n for n in module.names[:-1])}", module.name)

    def _calls_without_weight(self, adapter: Adapter) -> list[tuple[fx.Node, Region]]:
        program = self._region.program
        if isinstance(adapter, WeightAdapter):
            return []
        calls = ((call, program.region_of(call)) for call in program.sites(adapter))
        return [(call, region) for call, region in calls if len(call.args) == 2]

    def _has_adapter(self, site: Site) -> bool:
        """Whether a call of an adapter follows the site already."""
        if site.inner:
            holder = self._region.submodule(site.node)._modules.get(inside.HOLDER)
            return holder is not None and _flat(site.inner) in holder._modules
        return adapter_behind(site.node, self._region) is not None

    def _insert(self, site: Site, sites: list[Site], recipe: Recipe) -> Change:
        site = whole_weight(site, self._region) if recipe.whole else site
        adapter = self._adapter_of(site, recipe)
        adapter.targets, adapter.operators = _named(sites)
        if site.input is None or isinstance(site.form, Embedding):  # no values that could be dropped
            adapter[self._adapter].dropout = 0.0
        if site.inner:
            self._put_inside(site, adapter)
        elif site.input is None:
            self._behind_weight(site, adapter)
        else:
            self._behind_layer(site, adapter)
        return Change(_words(recipe, adapter[self._adapter]), site.name, source_of(site.node))

    def _why_not(self, site: Site, sites: Sequence[Site], recipe: Recipe) -> str | None:
        for other in sites:
            if other.form.layout != site.form.layout:
                return f"it is read as a '{other.form.kind}' too, whose update has another form"
            if recipe.dora and other.form.starts_normal != site.form.starts_normal:
                return f"it is read as a '{other.form.kind}' too, for which DoRA measures it along its other axis"
        reason = self._why_not_shared(site.form, site.slot, recipe)
        if reason is not None:
            return reason
        if recipe.init not in MOVES_WEIGHT:
            return None
        if not can_take_out(site.form):
            return f"init '{recipe.init}' takes the weight as one matrix, its parts have several"
        if isinstance(site.node, fx.Node) and self._is_tied(site):
            return f"its weight is tied and init '{recipe.init}' would change it elsewhere"
        layer = self._region.program.root.get_submodule(site.slot.rpartition(".")[0])
        parts = ("weight_mask", "weight_fake_quant") if isinstance(layer, Fused) else ()
        if any(layer._modules.get(part) is not None for part in parts):
            return (
                f"its weight is masked or fake-quantised, and would be so without what init '{recipe.init}' takes out; "
                "put 'lora' before, or take another init"
            )
        return None

    def _why_not_shared(self, form: Form, slot: str, recipe: Recipe) -> str | None:
        for known in self._known_of(slot):
            if known.form.layout != form.layout:
                return f"'{known.name}' shares its weight and sees it transposed"
            if recipe.dora and known.form.starts_normal != form.starts_normal:
                return f"'{known.name}' shares its weight and DoRA measures it along its other axis there"
        return why_not_sliced(recipe.slices, form) if recipe.slices else None

    def _is_tied(self, site: Site) -> bool:
        """Whether something reads the weight that is not to have this adapter."""
        known = self._known_of(site.slot)
        if known:
            return any(self._adapter not in adapter for adapter in known)
        program = self._region.program
        places = (name.rpartition(".")[::2] for name in program.names(site.weight))
        return len({(program.root.get_submodule(path), leaf) for path, leaf in places}) > 1

    def _adapter_of(self, site: Site, recipe: Recipe) -> Adapter:
        """The adapter of the parameter: shared with all other sites that read it."""
        program, known = self._region.program, self._known_of(site.slot)
        kind = WeightAdapter if site.input is None else LayerAdapter
        same = next((a for a in known if a.form == site.form and type(a) is kind and self._adapter in a), None)
        if same is not None:
            return same
        adapter = kind(site.form, site.slot, site.name)
        adapter.add_module(self._adapter, self._factors(site.form, site.slot, recipe))
        adapter.active = ((self._adapter, 1.0),)
        adapter.bias_slot = site.bias_slot
        owner, _, projection = site.slot.removesuffix(".weight").rpartition(".")
        if projection == "out_proj" and isinstance(program.root.get_submodule(owner), nn.MultiheadAttention):
            adapter.steps = 2
        self._remember(adapter)
        return adapter

    def _factors(self, form: Form, slot: str, recipe: Recipe) -> LowRank:
        """Those that another use of the weight has, else new ones."""
        program, known = self._region.program, self._known_of(slot)
        twin = next((each for each in known if self._adapter in each), None)
        if twin is not None:
            return twin[self._adapter]
        weight = program.root.get_parameter(slot)
        made, left = start(form, weight, recipe)
        if left is not None:
            program.replace_parameter(weight, left)
            self._known[self._key(slot)] = known
        return made

    def _behind_layer(self, site: Site, adapter: Adapter) -> None:
        region = self._region
        node = loosen(site.node, region)
        known = self._registered(adapter)
        assert site.input is not None
        # The input may have got an adapter of its own since the site was found.
        value = self._now.get(site.input, site.input)
        with region.graph.inserting_after(node):
            call = region.graph.call_module(known, (value, node))
        if adapter.takes_weight:
            call.args = (value, node, *_reads(call, site, region))
        region.program.note(call, region)
        inherit(call, node)
        node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
        self._now[node] = call

    def _behind_weight(self, site: Site, adapter: Adapter) -> None:
        region = self._region
        with region.graph.inserting_after(site.node):
            call = region.graph.call_module(self._registered(adapter), (site.node,))
        region.program.note(call, region)
        inherit(call, site.node)
        site.node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)

    def _put_inside(self, site: Site, adapter: Adapter) -> None:
        module = self._region.submodule(site.node)
        if inside.HOLDER not in module._modules:
            made = inside.adapted(module)
            self._region.program.replace_module(module, made)
            module = made
        assert isinstance(adapter, WeightAdapter)
        adapter.inner = site.inner
        module.get_submodule(inside.HOLDER).add_module(_flat(site.inner), adapter.train(module.training))

    def _registered(self, adapter: Adapter) -> str:
        """The name under which the region has the adapter."""
        if adapter not in self._calls:
            self._calls[adapter] = self._region.add_module(f"{inside.HOLDER}.{_flat(adapter.name)}", adapter)
        return self._calls[adapter]

    def _remember(self, adapter: Adapter) -> None:
        self._known.setdefault(self._key(adapter.slot), []).append(adapter)

    def _known_of(self, slot: str) -> list[Adapter]:
        """The adapters of a parameter."""
        return self._known.get(self._key(slot), [])

    def _key(self, slot: str) -> int | str:
        return id(self._region.program.root.get_parameter(slot)) if self._ties else slot


def _named(sites: Sequence[Site]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What targets may call the layers of a parameter, and what these compute."""
    names = dict.fromkeys(name for site in sites for name in site.names)
    return tuple(names), tuple(dict.fromkeys(site.operator for site in sites))


def _reads(before: fx.Node, site: Site, region: Region) -> list[fx.Node]:
    slots = [site.slot, *([site.bias_slot] if site.bias_slot else [])]
    relative = [slot.removeprefix(f"{region.path}.") if region.path else slot for slot in slots]
    return [region.insert_attribute(before, name) for name in relative]


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _words(recipe: Recipe, low: LowRank) -> str:
    kind = "DoRA" if recipe.dora else "LoRA"
    dropout_words = ", without dropout" if recipe.dropout and not low.dropout else ""
    start_words = "" if recipe.init == "default" else f", init {recipe.init}"
    return f"{kind} of rank {low.rank}, scale {low.scale:.4g}{start_words}{dropout_words}"
