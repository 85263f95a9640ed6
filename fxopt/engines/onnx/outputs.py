"""What a module gives, as a model in ONNX can give it: flat tensors, and what they are nested in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch.utils import _pytree as pytree

from fxopt.engines.once import once
from fxopt.engines.written import refuse_writes
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.nested import flatten, is_object, tensors_in, with_tensors

_NO_NUMPY = frozenset({torch.bfloat16})
_SEEDS = (1, 2)
"""Of inputs by which numbers that the module computes are told from constants."""


@dataclass(frozen=True)
class Outputs:
    """What the tensors that a module gives are nested in.

    Attributes:
        structure: the lists, tuples and dicts.
        with_others: an example, of tensors that hold nothing, where objects such as a cache are among it, or constants
            such as None: a file has the tensors within alone. None where there is nothing but tensors.
        counts: whether numbers within the objects are others for another batch size.
    """

    structure: pytree.TreeSpec
    with_others: Any
    counts: bool

    def holding(self, tensors: Sequence[torch.Tensor]) -> Any:
        """The same with these tensors, in order."""
        if self.with_others is None:
            return tensors[0] if self.structure.is_leaf() else pytree.tree_unflatten(tensors, self.structure)
        each = iter(tensors)
        return with_tensors(self.with_others, lambda _: next(each))


def outputs_of(engine: str, module: GraphModule, inputs: Inputs) -> Outputs:
    """What the module gives for the example.

    Raises:
        EngineError: where an input is no tensor that NumPy could hold or an object, an output is no such tensor and no
            constant, also one within an object, or the module writes into an input, a parameter or a buffer, which
            exporters leave out.
    """
    if inputs.objects:
        raise EngineError(
            f"engine '{engine}' takes tensors in lists, tuples or dicts, and no object that a call may change, as among"
            f" {inputs.describe()}"
        )
    given = inputs.map(lambda tensor: tensor.detach().clone())
    with torch.no_grad(), refuse_writes(engine, module, given.tensors):
        output = module(*given.args, **given.kwargs)
    for value in (*inputs.tensors, *tensors_in(output), *_computed(module, output)):
        is_array = isinstance(value, torch.Tensor) and value.layout is torch.strided and value.dtype not in _NO_NUMPY
        if not is_array or value.is_complex():
            what = f"{value.dtype} {value.layout}" if isinstance(value, torch.Tensor) else repr(value)
            raise EngineError(
                f"engine '{engine}' takes and gives dense tensors of real numbers that NumPy knows, not {what}"
            )
    structure = pytree.tree_structure(output)
    if all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(output)):
        return Outputs(structure, None, counts=False)
    numbers = _numbers(output)
    if any(_gives_others(module, inputs.fresh(seed), numbers) for seed in _SEEDS):
        raise EngineError(
            f"engine '{engine}' computes tensors alone, and an object among the outputs holds a number that depends on "
            "what the inputs hold: give it as a tensor, without `.item()`"
        )
    example = with_tensors(output, lambda tensor: tensor.new_empty(0))
    other = inputs.with_batch((inputs.batch_size or 0) + 1)
    return Outputs(structure, example, counts=_gives_others(module, other, numbers))


def _computed(module: GraphModule, output: Any) -> list[Any]:
    """The values that are no tensor and no object, and that no graph holds as they are."""
    leaves = pytree.tree_leaves(output)
    held = pytree.tree_leaves(next(node.args for node in module.graph.nodes if node.op == "output"))
    each_alone = len(held) == len(leaves)  # else a node stands for several of them
    others = [
        leaf
        for index, leaf in enumerate(leaves)
        if not (each_alone and not isinstance(held[index], fx.Node)) and not isinstance(leaf, torch.Tensor)
    ]
    return [value for value in others if value is not None and not is_object(value)]


def _gives_others(module: GraphModule, inputs: Inputs | None, numbers: list[Any]) -> bool:
    """Whether the numbers among the outputs are others for these inputs."""
    if inputs is None or not numbers:
        return False
    try:
        with torch.no_grad():
            return _numbers(once(module, [module], inputs)[0]) != numbers
    except Exception:  # of sizes or values that the module does not take
        return False


def _numbers(output: Any) -> list[Any]:
    return [value for value in flatten(output)[0] if isinstance(value, (int, float))]


def nested(outputs: Outputs, call: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]) -> Callable[..., Any]:
    """A function of nested tensors around one of flat dense tensors."""

    def run(*args: Any, **kwargs: Any) -> Any:
        # The common case is one of tensors alone; to look into structures costs as much as a small layer.
        flat: Sequence[Any] = args
        if kwargs or not all(type(value) is torch.Tensor for value in args):
            flat = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        found = call([leaf.detach().contiguous() for leaf in flat])
        return outputs.holding(found)

    return run
