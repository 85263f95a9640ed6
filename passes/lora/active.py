"""Which adapters of a module count: one, several with factors, none, or one a sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from fxopt.errors import PassError
from fxopt.graph import GraphModule
from passes.lora.adapter import BASE, Adapter, Beside
from passes.lora.samples import without_samples
from passes.lora.targets import nearest_names


def adapters(module: nn.Module) -> list[Adapter]:
    """The adapters of all layers.

    Raises:
        PassError: there are none.
    """
    found = [child for child in module.modules() if isinstance(child, Adapter)]
    if not found:
        raise PassError("the module has no adapters; put them in with the pass 'lora' first")
    return found


def unmerged(module: nn.Module) -> list[Adapter]:
    """The adapters of all layers, of which no weight may hold any.

    Raises:
        PassError: one does.
    """
    found = adapters(module)
    for adapter in found:
        if adapter.merged:
            raise PassError(f"the weight of '{adapter.name}' holds its adapters; call unmerge(module) first")
    return found


def names(module: nn.Module) -> list[str]:
    """Names of the adapters that any layer has."""
    return list(dict.fromkeys(name for adapter in adapters(module) for name in adapter.names))


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What an optimizer is to be given: the adapters, and the modules that are saved with them."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def root_of(module: nn.Module, adapter: Adapter) -> GraphModule:
    """The outermost captured module that holds an adapter: its names count from there."""
    if isinstance(module, GraphModule):
        return module
    roots = (child for child in module.modules() if isinstance(child, GraphModule))
    return next(root for root in roots if any(child is adapter for child in root.modules()))


def saved_with(module: nn.Module, name: str) -> Beside:
    """What is saved with an adapter."""
    return next((adapter[name].beside for adapter in adapters(module) if name in adapter), Beside())


def _trained_with(module: nn.Module, name: str) -> list[nn.Parameter]:
    root, beside = root_of(module, adapters(module)[0]), saved_with(module, name)
    biases = [root.get_parameter(path) for path in beside.tensors if path.rpartition(".")[2] == "bias"]
    return [*(each for path in beside.modules for each in root.get_submodule(path).parameters()), *biases]


def takes_part(module: nn.Module, name: str) -> tuple[Adapter, str] | None:
    """A layer and an adapter of it, another than `name`, for which its init took a part out of the weight."""
    found = [child for child in module.modules() if isinstance(child, Adapter)]
    return next(((a, each) for a in found for each in a.names if each != name and a[each].start_a is not None), None)


def set_adapter(module: nn.Module, name: str) -> None:
    """Let one adapter count, and train with what is saved with it, alone. The graph stays as it is.

    Of what is saved with adapters there is one copy, with the weights that were loaded last.

    Raises:
        PassError: no layer has an adapter of that name, or the weights hold another one.
    """
    weighted(module, {name: 1.0})
    for adapter in adapters(module):
        for other in adapter.names:
            adapter[other].requires_grad_(other == name)
    for other in sorted(names(module), key=name.__eq__):  # the one meant last, where two share a module
        for parameter in _trained_with(module, other):
            parameter.requires_grad_(other == name)


def weighted(module: nn.Module, factors: Mapping[str, float]) -> None:
    """Let several adapters count at once: `W + sum_i f_i s_i B_i A_i`.

    Raises:
        PassError: no layer has an adapter of one of the names, or the weights hold others.
    """
    known = names(module)
    for name in factors:
        if name not in known:
            near = nearest_names([name], known)
            raise PassError(f"no adapter is called '{name}'; there are {', '.join(repr(each) for each in near)}")
    for adapter in unmerged(module):
        adapter.active = tuple((name, float(factor)) for name, factor in factors.items() if name in adapter)


def enable(module: nn.Module) -> None:
    """Undo `disable`."""
    for adapter in adapters(module):
        adapter.batch = None


def disable(module: nn.Module) -> None:
    """Let no adapter count, until `enable`: the module computes what it did without them.

    Raises:
        PassError: the weights hold adapters.
    """
    for adapter in unmerged(module):
        adapter.batch = ()


@contextmanager
def mixed_batch(module: nn.Module, each: Sequence[str]) -> Iterator[None]:
    """In this context each sample of a batch has its own adapter, by name; `base` stands for none.

    Samples are counted along the first axis, of the inputs and in all layers.

    Raises:
        PassError: a name that no adapter has, an adapter of a layer that sees no samples, or along another axis, or the
            weights hold adapters.
    """
    known = names(module)
    for name in each:
        if name != BASE and name not in known:
            raise PassError(f"no adapter is called '{name}'; there are {', '.join(map(repr, known))}, and 'base'")
    found = unmerged(module)
    for layer, why in without_samples(module):
        if not set(each).isdisjoint(layer.names):
            raise PassError(f"'{layer.name}' {why}: in a mixed batch it can't have adapters; leave it out by 'exclude'")
    before = [adapter.batch for adapter in found]
    try:
        for adapter in found:
            adapter.batch = tuple(each)
        yield
    finally:
        for adapter, batch in zip(found, before, strict=True):
            adapter.batch = batch
