"""The pass `lora`."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, get_args

from torch import nn

from fxopt.contract import Change, Pass, Promise, Skip
from fxopt.errors import PassError, SpecError
from fxopt.graph import GraphModule, Program, Region, eliminate_dead
from fxopt.inputs import Inputs
from passes.lora.adapter import Adapter, Beside, can_be_called
from passes.lora.files import load_adapter, save_adapter, show_adapter
from passes.lora.fold import merge, merged_weights
from passes.lora.init import MOVES_WEIGHT, Init, Recipe
from passes.lora.insert import Insertion
from passes.lora.sites import Site, find_sites
from passes.lora.slices import check_slice
from passes.lora.targets import ALL_LINEAR, check_target, first_meant, is_meant, nearest_names

_MOST = 2**16
"""The highest rank: beyond the smaller side of a weight none adds anything, and no layer has one as long."""


@dataclass(frozen=True)
class LoRA(Pass):
    """Adds low-rank adapters to layers, which train while everything else is frozen.

        W x + b   =>   W x + b + s B (A x)        A (r, in), B (out, r) = 0, s = alpha / r

    Layers are Linear, Conv1d to 3d and their transposed forms, Embedding, the weights of attention and recurrent
    layers, and any parameter that a function uses: `F.linear`, `x @ w`, `F.conv2d`, an einsum. A parameter has
    one adapter, however many layers share it. B is zero, so the outputs stay equal to the bit, as far as torch runs
    frozen weights by the same kernels. With `dora` a weight is `m (W + s B A) / |W + s B A|`.

    Sources: Hu et al. 2021; rsLoRA, Kalajdzievski 2023; DoRA, Liu et al. 2024.
    """

    name: ClassVar[str] = "lora"
    promise: ClassVar[Promise] = Promise.CLOSE
    after: ClassVar[tuple[str, ...]] = ("clean",)

    rank: int = field(default=8, metadata={"help": "r: the columns of B and the rows of A"})
    alpha: float | None = field(default=None, metadata={"help": "s = alpha / rank; none for s = 1"})
    targets: tuple[str, ...] = field(
        default=(ALL_LINEAR,),
        metadata={"help": "all-linear, a glob, re:REGEX, the end of a name, op:conv2d, or shape:768x*"},
    )
    exclude: tuple[str, ...] = field(default=(), metadata={"help": "the same; wins over targets"})
    dropout: float = field(default=0.0, metadata={"help": "probability of dropping inputs of an adapter in training"})
    init: Init = field(default="default", metadata={"help": "what A and B start from"})
    rslora: bool = field(default=False, metadata={"help": "s = alpha / sqrt(rank)"})
    dora: bool = field(default=False, metadata={"help": "train the length of each weight apart from its direction"})
    rank_pattern: Mapping[str, int] = field(
        default_factory=dict, hash=False, metadata={"help": "another rank for the layers that a target means"}
    )
    alpha_pattern: Mapping[str, float] = field(
        default_factory=dict, hash=False, metadata={"help": "another alpha for the layers that a target means"}
    )
    slices: tuple[str, ...] = field(
        default=(), metadata={"help": "adapt these outputs of a fused weight only: q, k, v of three, or 0-768"}
    )
    modules_to_save: tuple[str, ...] = field(
        default=(), metadata={"help": "modules that train as a whole and are saved with the adapter"}
    )
    adapter: str = field(default="default", metadata={"help": "name of the adapter"})
    bits: int = field(default=4, metadata={"help": "of the weight that init loftq leaves"})

    # What the command line does with adapters: it knows passes by name only.
    save = staticmethod(save_adapter)
    load = staticmethod(load_adapter)
    show = staticmethod(show_adapter)
    merge = staticmethod(merge)
    merged_weights = staticmethod(merged_weights)

    def __post_init__(self) -> None:
        _check(self)
        # loftq rounds the base weight, and a dropout draws random numbers that others in the model then don't get.
        if self.init == "loftq" or self.dropout:
            object.__setattr__(self, "promise", Promise.CHANGES)

    def run(self, region: Region) -> Iterator[Change | Skip]:
        """Add an adapter to each layer that is meant."""
        yield from Insertion(region, self.adapter, self._recipe).run()

    def finish(self, module: GraphModule, calibration: Iterable[Inputs]) -> Iterator[Change | Skip]:
        """Let the adapter train and nothing else but what is to be saved with it.

        Raises:
            PassError: no layer has the adapter.
        """
        layers = (child for child in module.modules() if isinstance(child, Adapter))
        trains = [layer[self.adapter] for layer in layers if self.adapter in layer]
        if not trains:
            raise PassError(self._nothing(module))
        saved = self._saved(module)
        before = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
        module.requires_grad_(False)
        for part in (*trains, *saved.values()):
            part.requires_grad_(True)
        for low in trains:
            low.beside = Beside(modules=tuple(saved))
        after = {id(parameter) for parameter in module.parameters() if parameter.requires_grad}
        if after != before:
            trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
            total = sum(p.numel() for p in module.parameters())
            share = 100 * trainable / total
            yield Change(f"{trainable:,} of {total:,} parameters train ({share:.2g} %)", f"adapter '{self.adapter}'")

    def _recipe(self, names: tuple[str, ...], operators: Collection[str], weight: nn.Parameter) -> Recipe | None:
        shape = tuple(weight.shape)
        if not any(is_meant(target, names, operators, shape) for target in self.targets):
            return None
        if any(is_meant(target, names, operators, shape) for target in self.exclude):
            return None
        rank = first_meant(self.rank_pattern, names, operators, shape) or self.rank
        alpha = first_meant(self.alpha_pattern, names, operators, shape)
        if alpha is None:
            alpha = rank if self.alpha is None else self.alpha
        return Recipe(rank, alpha, self.rslora, self.dora, self.dropout, self.init, self.bits, self.slices)

    def _saved(self, module: GraphModule) -> dict[str, nn.Module]:
        found = {}
        for pattern in self.modules_to_save:
            names = [name for name, _ in module.named_modules() if name and is_meant(pattern, (name,), (), ())]
            if not names:
                every = [name for name, _ in module.named_modules() if name]
                near = ", ".join(f"'{name}'" for name in nearest_names([pattern], every))
                raise PassError(f"lora: no module is called '{pattern}' of 'modules_to_save'; the nearest are {near}")
            found.update({name: module.get_submodule(name) for name in names})
        return found

    def _nothing(self, module: GraphModule) -> str:
        regions = Program(module).regions
        sites = [site for region in regions for site in find_sites(region) if isinstance(site, Site)]
        wanted = ", ".join(f"'{target}'" for target in self.targets)
        refused = next((s for region in regions for s in Insertion(region, self.adapter, self._recipe).refused()), None)
        if refused is not None:
            return f"lora: {wanted} matches no layer that can be adapted; '{refused.where}' stays: {refused.reason}"
        if not sites:
            return f"lora: the model has no layer that an adapter could go on; the targets were {wanted}"
        near = nearest_names(self.targets, [name for site in sites for name in site.names])
        listed = ", ".join(f"'{name}'" for name in near)
        but = f" without what 'exclude' takes out ({', '.join(self.exclude)})" if self.exclude else ""
        return f"lora: {wanted} matches no layer{but}; the nearest names are {listed}"


def inject(module: GraphModule, lora: LoRA) -> tuple[Change | Skip, ...]:
    """Run the pass on a captured module in place, without verifying: nothing else in it is touched."""
    found: list[Change | Skip] = []
    for region in Program(module).regions:
        found += lora.run(region)
        eliminate_dead(region)
        region.graph.lint()
        region.module.recompile()
    found += lora.finish(module, ())
    return tuple(found)


def _check(lora: LoRA) -> None:
    for name, value in (("rank", lora.rank), *((f"rank_pattern.{k}", v) for k, v in lora.rank_pattern.items())):
        if not 1 <= value <= _MOST:
            raise SpecError(f"lora: '{name}' is 1 to {_MOST}, not {value}")
    for name, number in (("alpha", lora.alpha), *((f"alpha_pattern.{k}", v) for k, v in lora.alpha_pattern.items())):
        if number is not None and not math.isfinite(number):
            raise SpecError(f"lora: '{name}' is a number, not {number}")
    if not 0 <= lora.dropout < 1:
        raise SpecError(f"lora: 'dropout' is 0 or more and below 1, not {lora.dropout}")
    if lora.init not in get_args(Init):
        raise SpecError(f"lora: 'init' is one of {', '.join(get_args(Init))}, not '{lora.init}'")
    if lora.bits not in range(2, 9):
        raise SpecError(f"lora: 'bits' is 2 to 8, not {lora.bits}")
    if not lora.targets:
        raise SpecError("lora: 'targets' is empty; it would adapt nothing")
    if lora.slices and (lora.dora or lora.init in MOVES_WEIGHT):
        raise SpecError("lora: 'slices' goes with neither 'dora' nor an init that takes a part out of the weight")
    if not lora.adapter.isidentifier():
        raise SpecError(f"lora: 'adapter' is a name of letters, digits and _, not '{lora.adapter}'")
    if not can_be_called(lora.adapter):
        raise SpecError(f"lora: 'adapter' can't be '{lora.adapter}', which means something else; take another name")
    for option in ("targets", "exclude", "rank_pattern", "alpha_pattern"):
        for target in getattr(lora, option):
            check_target(target, option)
    for each in lora.slices:
        check_slice(each)
