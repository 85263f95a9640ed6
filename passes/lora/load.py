"""Puts the adapters of a file on a captured module: first everything is checked, then the graph is edited."""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.fx as fx
from torch import nn

from fxopt.capture.shell import run_shell
from fxopt.errors import ArtifactError
from fxopt.graph import GraphModule, Program, Region, eliminate_dead
from passes.lora.active import takes_part
from passes.lora.adapter import Adapter, Beside
from passes.lora.entries import Entry, from_entry
from passes.lora.forms import Form
from passes.lora.init import Recipe, start
from passes.lora.insert import Insertion
from passes.lora.settings import Settings
from passes.lora.sites import Site, find_sites
from passes.lora.targets import nearest_names


@dataclass(frozen=True)
class Loading:
    """One file on its way into a module.

    Attributes:
        module: a captured one.
        adapter: the name that the adapter gets.
        settings: of the file.
        entries: its adapters by layer.
        rest: its other tensors: modules that were saved whole.
        source: what messages call the file.
    """

    module: GraphModule
    adapter: str
    settings: Settings
    entries: Mapping[str, Entry]
    rest: Mapping[str, torch.Tensor]
    source: str

    def run(self) -> None:
        """Check all, then load all.

        Raises:
            ArtifactError: something of the file has no place, or a layer that it is for gets nothing.
        """
        forms = self._forms()
        unused = self._unused({entry.name for entry in self.entries.values()} - forms.keys())
        by_name = {entry.name: entry for entry in self.entries.values() if entry.name not in unused}
        self._refuse(by_name)
        self._check(by_name, forms)
        for name, entry in by_name.items():
            form, weight = forms[name]
            from_entry(entry, form, start(form, weight, self._recipe(entry))[0], self.settings)
        before = {child: child.takes_weight for child in self.module.modules() if isinstance(child, Adapter)}
        if not before:
            # As the pass `lora` leaves it; where that has been, what trains is the user's choice.
            self.module.requires_grad_(False)
        for region in Program(self.module).regions:
            insertion = self._insertion(region, by_name)
            list(insertion.run())
            for child in self._with_magnitude(region, by_name):
                insertion.hand_on_weight(child)
            eliminate_dead(region)
            region.graph.lint()
            region.module.recompile()
        self._fill(by_name)
        for each in self.module.modules():
            if isinstance(each, Adapter) and (each not in before or (each.takes_weight and not before[each])):
                each.edited = True
        self._load_beside()

    def _insertion(self, region: Region, by_name: Mapping[str, Entry]) -> Insertion:
        # In PEFT the layers of a tied weight have adapters of their own.
        return Insertion(region, self.adapter, lambda names, *_: self._choose(names, by_name), ties=False)

    def _with_magnitude(self, region: Region, by_name: Mapping[str, Entry]) -> list[Adapter]:
        """The layers whose adapter of that name is one of DoRA in the file."""
        named = {name for name, entry in by_name.items() if entry.magnitude is not None}
        found = (child for child in region.module.modules() if isinstance(child, Adapter) and self.adapter in child)
        return [adapter for adapter in found if adapter.name in named]

    def _refuse(self, by_name: Mapping[str, Entry]) -> None:
        """Nothing is changed for a file of which a part could not be put on the model."""
        for region in Program(self.module).regions:
            insertion = self._insertion(region, by_name)
            reasons = [(skip.where, skip.reason) for skip in insertion.refused()]
            of_dora = self._with_magnitude(region, by_name)
            reasons += [(each.name, reason) for each in of_dora if (reason := insertion.why_no_weight(each))]
            for name, reason in reasons:
                raise ArtifactError(f"'{self.source}' is for '{name}', which can't be adapted: {reason}")

    def _forms(self) -> dict[str, tuple[Form, nn.Parameter]]:
        """All layers that could have an adapter, with those that do."""
        program = Program(self.module)
        found: dict[str, tuple[Form, nn.Parameter]] = {}
        for region in program.regions:
            for site in find_sites(region):
                if isinstance(site, Site):
                    found[site.name] = (site.form, site.weight)
        for child in self.module.modules():
            if isinstance(child, Adapter):
                found[child.name] = (child.form, self.module.get_parameter(child.slot))
        return found

    def _unused(self, names: set[str]) -> set[str]:
        """Those of the names that are layers of the model and that it does not use."""
        program, modules = Program(self.module), dict(self.module.named_modules(remove_duplicate=False))
        # What a user's own forward may call no graph shows.
        own = [each for each in program.regions if any(node.target is run_shell for node in each.graph.nodes)]

        def is_used(layer: nn.Module) -> bool:
            readers = (node for weight in layer.parameters() for node in program.readers(weight))
            users = (_read_by(node, program.region_of(node)) for node in readers)
            return any(layer in user.modules() for user in (*users, *(region.module for region in own)))

        return {name for name in names & modules.keys() if not is_used(modules[name])}

    def _check(self, by_name: Mapping[str, Entry], forms: Mapping[str, tuple[Form, nn.Parameter]]) -> None:
        if not by_name and not self.rest:
            raise ArtifactError(f"'{self.source}' holds no tensors of an adapter of a layer that the model uses")
        merged = next((child for child in self.module.modules() if isinstance(child, Adapter) and child.merged), None)
        if merged is not None:
            raise ArtifactError(f"the weight of '{merged.name}' holds its adapters; call unmerge(module) first")
        taken = takes_part(self.module, "")
        if taken is not None:
            raise ArtifactError(
                f"'{self.source}' is for the original weights: that of '{taken[0].name}' is without what the init of "
                f"adapter '{taken[1]}' took out of it; load it into a module that is captured anew"
            )
        for name in by_name:
            if name not in forms:
                near = ", ".join(f"'{each}'" for each in nearest_names([name], forms))
                raise ArtifactError(f"'{self.source}' is for a layer '{name}' that the model hasn't; nearest: {near}")
        if not self.settings.restricted:
            saved = self._beside().modules  # PEFT adapts none of these, though it lists them as targets
            for name, (form, _) in forms.items():
                if name in by_name or name in saved or form.kind == "weight":
                    continue
                if self.settings.is_target(name):
                    raise ArtifactError(f"'{self.source}' targets '{name}' and has no weights for it: they are missing")
        state = self.module.state_dict()
        for key, tensor in self._rest.items():
            if key not in state:
                near = ", ".join(f"'{each}'" for each in nearest_names([key], state))
                raise ArtifactError(f"'{self.source}' has a tensor '{key}' that the model hasn't; nearest: {near}")
            if state[key].shape != tensor.shape:
                shapes = f"{tuple(tensor.shape)}, not {tuple(state[key].shape)}"
                raise ArtifactError(f"'{self.source}' has a '{key}' of shape {shapes}")

    def _choose(self, names: tuple[str, ...], by_name: Mapping[str, Entry]) -> Recipe | None:
        entry = by_name.get(names[0])
        return None if entry is None else self._recipe(entry)

    def _recipe(self, entry: Entry) -> Recipe:
        # PEFT has no DoRA for parameters: such a file is ours, and measures the weight as the layer has it.
        dora = entry.magnitude is not None
        return Recipe(entry.rank, entry.scale * entry.rank, dora=dora, whole=bool(entry.parameter) and not dora)

    def _fill(self, by_name: Mapping[str, Entry]) -> None:
        filled: dict[nn.Parameter, list[Adapter]] = defaultdict(list)
        for child in self.module.modules():
            if isinstance(child, Adapter) and self.adapter in child and child.name in by_name:
                low, same = child[self.adapter], filled[self.module.get_parameter(child.slot)]
                if any(each[self.adapter] is low for each in same):
                    low = copy.deepcopy(low)
                from_entry(by_name[child.name], child.form, low, self.settings)
                if _counts(child, self.adapter):
                    low.requires_grad_(True)
                child.add_module(self.adapter, low)
                twin = next((each for each in same if _are_equal(child, each, self.adapter)), child)
                child.add_module(self.adapter, twin[self.adapter])
                same.append(child)

    def _load_beside(self) -> None:
        program, beside = Program(self.module), self._beside()
        layers = [child for child in self.module.modules() if isinstance(child, Adapter) and self.adapter in child]
        trains = not layers or any(_counts(layer, self.adapter) for layer in layers)
        for key, tensor in self._rest.items():
            path, _, leaf = key.rpartition(".")
            owner = self.module.get_submodule(path)
            old = owner._parameters.get(leaf)
            if old is None:
                buffer = owner._buffers[leaf]
                assert buffer is not None
                owner._buffers[leaf] = tensor.to(buffer).clone()
            elif key in beside.tensors and leaf != "bias":
                program.replace_parameter(old, tensor.to(old).clone())
            else:
                made = nn.Parameter(tensor.to(old).clone(), requires_grad=trains or old.requires_grad)
                owner._parameters[leaf] = made
        for layer in layers:
            layer[self.adapter].beside = beside

    @functools.cached_property
    def _rest(self) -> dict[str, torch.Tensor]:
        """What is saved with the adapters, by the names of the model: in a file, PEFT's adapters are around layers."""
        state = self.module.state_dict()
        return {key if key in state else key.replace("base_layer.", ""): tensor for key, tensor in self.rest.items()}

    def _beside(self) -> Beside:
        """By `bias` a file has biases, and with an embedding its base; all else are modules that are saved whole."""

        def is_alone(key: str) -> bool:
            return key not in self.rest or (self.settings.bias != "none" and key.rpartition(".")[2] == "bias")

        modules = {key.rpartition(".")[0] for key in self._rest if not is_alone(key)}
        alone = (key for key in self._rest if is_alone(key) and key.rpartition(".")[0] not in modules)
        return Beside(tuple(sorted(modules)), tuple(alone), self.settings.bias)


def _read_by(node: fx.Node, region: Region) -> nn.Module:
    """What a node calls, or the owner of what it reads."""
    path = str(node.target)
    return region.module.get_submodule(path if node.op == "call_module" else path.rpartition(".")[0])


def _are_equal(one: Adapter, other: Adapter, name: str) -> bool:
    """Whether two layers of one weight have equal adapters, which may then be one."""
    mine, theirs = one[name].state_dict(), other[name].state_dict()
    alike = one.form.layout == other.form.layout and one[name].scale == other[name].scale
    return alike and mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def _counts(adapter: Adapter, name: str) -> bool:
    return any(active == name for active, _ in adapter.active)
