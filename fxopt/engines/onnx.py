"""A captured module as an ONNX model, and the way of its inputs and outputs: for engines that read ONNX."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx as fx
from torch import nn
from torch.utils import _pytree as pytree

from fxopt.capture.leaves import is_leaf
from fxopt.capture.shell import run_shell
from fxopt.contract import Skip
from fxopt.engines.decided import without_decided_guards
from fxopt.engines.once import once
from fxopt.engines.onnx_attention import transpose_keys
from fxopt.engines.onnx_biases import hold_biases
from fxopt.engines.onnx_empty import drop_empty_assignments
from fxopt.engines.onnx_functions import ExportedOtherwise
from fxopt.engines.onnx_moved import pad_integers, split_weights
from fxopt.engines.onnx_products import part_sums, transpose_weights
from fxopt.engines.onnx_simplify import simplify
from fxopt.engines.onnx_zero_points import part_zero_points
from fxopt.engines.written import refuse_writes
from fxopt.errors import EngineError
from fxopt.graph import GraphModule, Program
from fxopt.inputs import Inputs
from fxopt.modules import for_onnx
from fxopt.nested import flatten, is_object, tensors_in, with_tensors

_BATCH = "batch"
_NO_NUMPY = frozenset({torch.bfloat16})
_KNOWN = ("torch", "_operator", "operator", "math", "builtins", "fxopt")
ASKED = Skip("", "whether it holds for a batch size is asked of the module at each new one; a saved file asks nothing")
"""Told of a model whose export `asks`."""


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


@dataclass(frozen=True)
class Export:
    """A module as ONNX.

    Attributes:
        program: the model.
        reasons: why its batch size is fixed; empty where it is free.
        asks: whether it may hold for some batch sizes only: guards of the module decide by them, which it has not, or
            code may that no graph holds.
    """

    program: torch.onnx.ONNXProgram
    reasons: tuple[Skip, ...] = ()
    asks: bool = False


def export(module: GraphModule, inputs: Inputs, outputs: Outputs) -> Export:
    """The module as ONNX, with a free batch size where it has one.

    Raises:
        EngineError: where torch cannot export it, with its reason.
    """
    batch = None if outputs.counts else inputs.batch_size
    reason = "a number that it gives follows it" if outputs.counts else "the inputs have no common batch size"
    if batch:
        # An example of one row would be taken for a constant.
        several = inputs if batch > 1 else inputs.with_batch(2)
        assert several is not None
        shape = torch.export.Dim(_BATCH, min=1)
        shapes = pytree.tree_map(lambda leaf: {0: shape} if _has_rows(leaf) else None, (several.args, several.kwargs))
        try:
            decided, asks = without_decided_guards(module, _of_two_batches(several))
            program = _export(decided, several, outputs, shapes)
            # The exporter fixes what the module turns out to hold for only, and says so nowhere.
            if any(isinstance(value.shape[0], int) for value in program.model.graph.inputs if value.shape):
                reason = f"the module does not hold for another one than that of the example, {batch}"
            else:
                return Export(program, asks=asks or _runs_unseen(module))
        except Exception as error:  # the exporter raises anything
            reason = f"the exporter says: {_first_line(error)}"
    try:
        program = _export(without_decided_guards(module, [inputs])[0], inputs, outputs, None)
        return Export(program, (Skip("", f"the batch size is fixed: {reason}"),))
    except Exception as error:
        raise EngineError(f"torch cannot export one: {_first_line(error)}{_opaque(module)}") from error


def outputs_of(engine: str, module: GraphModule, inputs: Inputs) -> Outputs:
    """What the module gives for the example.

    Raises:
        EngineError: where an input is no tensor that NumPy could hold or an object, an output is no such tensor and no
            constant, or the module writes into an input, a parameter or a buffer, which exporters leave out.
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
    example = with_tensors(output, lambda tensor: tensor.new_empty(0))
    return Outputs(structure, example, _counts(module, inputs, _numbers(output)))


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


def _counts(module: GraphModule, inputs: Inputs, numbers: list[Any]) -> bool:
    other = inputs.with_batch((inputs.batch_size or 0) + 1) if numbers else None
    if other is None:
        return False
    try:
        with torch.no_grad():
            return _numbers(once(module, [module], other)[0]) != numbers
    except Exception:  # of a size that the module does not take
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


class _TensorsWithin(nn.Module):
    """Gives the tensors that the outputs of a module are made of."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

        # The exporter finds free sizes by the names of the parameters.
        @functools.wraps(module.forward)
        def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
            return tuple(tensors_in(module(*args, **kwargs)))

        self.forward = forward


def _export(module: GraphModule, inputs: Inputs, outputs: Outputs, shapes: Any) -> torch.onnx.ONNXProgram:
    prepared = for_onnx(module)
    if outputs.with_others is not None:
        prepared = _TensorsWithin(prepared)
    dynamic = None if shapes is None else _by_parameter(prepared, *shapes)
    # The exporter makes one input of a tensor that is given twice, whatever later calls give there.
    given = inputs.map(lambda tensor: tensor.detach().clone())
    # Where nothing is named, it would read a dict that comes last as the named arguments.
    args = given.args if given.kwargs else (*given.args, {})
    with quiet(), ExportedOtherwise():
        program = torch.onnx.export(
            prepared,
            args,
            kwargs=dict(given.kwargs),
            dynamo=True,
            dynamic_shapes=dynamic,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        simplify(program.model)
    if len(program.model.graph.inputs) != len(inputs.tensors):
        raise EngineError(f"it has {len(program.model.graph.inputs)} inputs in place of {len(inputs.tensors)}")
    drop_empty_assignments(program.model)
    transpose_keys(program.model)
    pad_integers(program.model)
    split_weights(program.model)
    hold_biases(program.model)
    transpose_weights(program.model)
    part_sums(program.model)
    part_zero_points(program.model)
    _drop_unread(program.model)
    _drop_metadata(program.model)
    return program


def _drop_unread(model: Any) -> None:
    """Take out what nothing reads any more, as weights that others were put in the place of: files would hold both."""
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)


def _drop_metadata(model: Any) -> None:
    """Take out what the exporter notes of itself, stack traces above all: a tenth of the file of a small int8 model."""
    graph = model.graph
    noted = [model, graph, *graph.all_nodes(), *graph.inputs, *graph.initializers.values()]
    noted += [output for node in graph.all_nodes() for output in node.outputs]
    for one in noted:
        one.metadata_props.clear()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters and converters print and warn of themselves."""
    said = io.StringIO()
    logged = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logged)


def _of_two_batches(inputs: Inputs) -> list[Inputs]:
    other = inputs.with_batch((inputs.batch_size or 0) + 1)
    assert other is not None
    return [inputs, other]


def _has_rows(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0


def _by_parameter(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    import inspect

    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    return dict(bound.arguments)


def _runs_unseen(module: GraphModule) -> bool:
    """Whether anything but functions and layers of torch runs, that no graph shows."""
    for region in Program(module).regions:
        for node in region.graph.nodes:
            if node.target is run_shell:
                return True
            if node.op == "call_module":
                child = region.submodule(node)
                if isinstance(child, torch.jit.ScriptModule) or not (isinstance(child, GraphModule) or is_leaf(child)):
                    return True
            elif node.op == "call_function":
                owner = getattr(node.target, "__self__", None)  # of the `apply` of an autograd function, its class
                home = (owner if isinstance(owner, type) else node.target).__module__ or "torch"
                if home.partition(".")[0] not in _KNOWN:
                    return True
    return False


def _opaque(module: GraphModule) -> str:
    """Where no graph shows what runs, which is then the likely reason."""
    regions = Program(module).regions
    paths = {region.path for region in regions if any(node.target is run_shell for node in region.graph.nodes)}
    if not paths:
        return ""
    where = ", ".join(f"'{path}'" if path else "the module itself" for path in sorted(paths))
    return f"; Python code that no graph holds runs in {where}: `fxopt run` names the lines that are why"


def _first_line(error: Exception) -> str:
    """What the innermost error says: the outer ones tell how to report it to torch."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0][:200]}" if lines else type(cause).__name__
