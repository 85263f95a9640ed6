"""One pass over a captured module, and the tidying up behind it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import nn
from torch.fx.passes.shape_prop import _extract_tensor_metadata

from fxopt.capture.state import State, random_state_kept
from fxopt.contract import Change, Pass, Skip
from fxopt.errors import FxoptError, PassError
from fxopt.graph import GraphModule, Program, Region, eliminate_dead, observe
from fxopt.graph.absorbed import run_through
from fxopt.inputs import Inputs

_SHAPES_OF = "shapes_of"
"""Key of a graph module's metadata: what the shapes in that of its nodes are those of."""


def run_pass(
    each: Pass,
    module: GraphModule,
    calibration: Sequence[Inputs],
    limit: int | None = None,
    spared: Set[str] = frozenset(),
) -> tuple[tuple[Change, ...], tuple[Skip, ...]]:
    """Run one pass over every region, up to `limit` changes, and tidy up behind it.

    Dead nodes go, and the modules and tensors that nothing uses any more; code is generated anew. With a limit
    the pass is not finished: that is for finding the change that broke it. Places in `spared` are left alone.
    """
    found: list[Change | Skip] = []
    program = Program(module, spared)
    called, read = dict[tuple[str, str], nn.Module](), set[tuple[str, str]]()
    for region in program.regions:
        called, read = called | _called(region), read | _read(region)
    try:
        for region in program.regions:
            for item in each.run(region):
                found.append(item)
                if limit is not None and sum(isinstance(one, Change) for one in found) >= limit:
                    break
            # What the pass put where nothing reads it goes, too.
            called, read = called | _called(region), read | _read(region)
            eliminate_dead(region)
            region.graph.lint()
    except FxoptError:
        raise
    except Exception as error:
        raise PassError(
            f"{each.name}: failed with {type(error).__name__}: {error}; this is a bug of the pass: nothing was saved"
        ) from error
    through = run_through(program.regions) if program.absorbed else {}
    for absorbed in program.absorbed:
        absorbed.settle(through[absorbed.region.module])
    _remove_dead_state(program, called, read)
    for region in program.regions:
        region.module.recompile()
    if limit is None:
        found += list(each.finish(module, calibration))
    changes = tuple(item for item in found if isinstance(item, Change))
    return changes, tuple(item for item in found if isinstance(item, Skip))


def _called(region: Region) -> dict[tuple[str, str], nn.Module]:
    return {
        (region.path, str(node.target)): region.submodule(node)
        for node in region.graph.nodes
        if node.op == "call_module"
    }


def _read(region: Region) -> set[tuple[str, str]]:
    return {(region.path, str(node.target)) for node in region.graph.nodes if node.op == "get_attr"}


def _remove_dead_state(program: Program, called: dict[tuple[str, str], nn.Module], read: set[tuple[str, str]]) -> None:
    """Remove the modules, parameters and buffers whose last use the pass took away."""
    after = Program(program.root)
    owners = {region.path: region.module for region in after.regions}
    for (path, name), module in called.items():
        dead = not after.sites(module) and not after.inside_opaque(module)
        tensors = (*module.parameters(), *module.buffers())
        if not tensors:  # costs nothing, and its owner's own methods may name it
            continue
        if dead and _registered(owners[path], name) is module and not any(after.readers(tensor) for tensor in tensors):
            owners[path].delete_submodule(name)
    for path, name in read.difference(*map(_read, after.regions)):
        owner_name, _, leaf = name.rpartition(".")
        try:
            owner = owners[path].get_submodule(owner_name)
        except AttributeError:  # went away with its module
            continue
        slots: dict[str, Any] = owner._parameters if leaf in owner._parameters else owner._buffers
        tensor = slots.get(leaf)
        if isinstance(tensor, torch.Tensor) and not after.readers(tensor) and not after.inside_opaque(owner):
            slots[leaf] = None  # not deleted: the owner's own methods, its repr for one, may name it


def _registered(owner: nn.Module, name: str) -> nn.Module | None:
    try:
        return owner.get_submodule(name)
    except AttributeError:  # it went away with what held it
        return None


def propagate_shapes(module: GraphModule, inputs: Inputs) -> None:
    """Run `module` once and write shape, dtype and the like of each value into the metadata of its node.

    Not again, also of a copy, while graphs, modules and inputs are what they were: a call may take seconds.
    """
    if module.meta.get(_SHAPES_OF) == _described(module, inputs):
        return

    def visit(_: GraphModule, node: torch.fx.Node, value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.layout is torch.strided and not value.is_quantized:
            node.meta["tensor_meta"] = _extract_tensor_metadata(value)

    state = State(module)
    try:
        with torch.set_grad_enabled(module.training), random_state_kept():
            given = inputs.map(lambda tensor: tensor.detach().clone())
            observe(module, given.args, given.kwargs, visit)
    finally:
        state.restore()
    module.meta[_SHAPES_OF] = _described(module, inputs)


def _described(module: GraphModule, inputs: Inputs) -> str:
    """All that the metadata follows from but the values of tensors, and which nodes have it, as a digest."""
    parts: list[object] = [module.training, inputs.describe(), *map(repr, inputs.objects)]
    parts += [(tensor.shape, tensor.stride(), tensor.dtype, tensor.device) for tensor in inputs.tensors]
    for child in module.modules():
        parts.append(type(child))
        if isinstance(child, GraphModule):
            parts += [child.graph, [node.name for node in child.graph.nodes if "tensor_meta" in node.meta]]
    parts += [(name, one.shape, one.dtype) for name, one in [*module.named_parameters(), *module.named_buffers()]]
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
