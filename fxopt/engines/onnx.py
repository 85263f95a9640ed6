"""A captured module as an ONNX model, and the way of its inputs and outputs: for engines that read ONNX."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from fxopt.capture.shell import run_shell
from fxopt.contract import Skip
from fxopt.engines.decided import without_decided_guards
from fxopt.errors import EngineError
from fxopt.graph import GraphModule, Program
from fxopt.inputs import Inputs
from fxopt.modules import for_onnx

_BATCH = "batch"
_NO_NUMPY = frozenset({torch.bfloat16})


def export(module: GraphModule, inputs: Inputs) -> tuple[torch.onnx.ONNXProgram, tuple[Skip, ...]]:
    """The module as ONNX, with a free batch size where it has one; a `Skip` says why it has not.

    Raises:
        EngineError: where torch cannot export it, with its reason.
    """
    batch = inputs.batch_size
    reason = "the inputs have no common batch size"
    if batch:
        # An example of one row would be taken for a constant.
        several = inputs if batch > 1 else inputs.with_batch(2)
        assert several is not None
        shape = torch.export.Dim(_BATCH, min=1)
        shapes = pytree.tree_map(lambda leaf: {0: shape} if _has_rows(leaf) else None, (several.args, several.kwargs))
        try:
            decided = without_decided_guards(module, _of_two_batches(several))
            program = _export(decided, several, _by_parameter(module, *shapes))
            # The exporter fixes what the module turns out to hold for only, and says so nowhere.
            if any(isinstance(value.shape[0], int) for value in program.model.graph.inputs if value.shape):
                reason = f"the module does not hold for another one than that of the example, {batch}"
            else:
                return program, ()
        except Exception as error:  # the exporter raises anything
            reason = f"the exporter says: {_first_line(error)}"
    try:
        return _export(without_decided_guards(module, [inputs]), inputs, None), (
            Skip("", f"the batch size is fixed: {reason}"),
        )
    except Exception as error:
        raise EngineError(f"torch cannot export one: {_first_line(error)}{_opaque(module)}") from error


def output_structure(engine: str, module: GraphModule, inputs: Inputs) -> pytree.TreeSpec:
    """How the outputs of the module are nested.

    Raises:
        EngineError: where an input or output is no tensor that NumPy could hold, or an object that holds some.
    """
    takes = f"engine '{engine}' takes and gives dense tensors that NumPy knows, in lists, tuples or dicts, not"
    if inputs.holds_objects:
        raise EngineError(f"{takes} objects, as among {inputs.describe()}")
    with torch.no_grad():
        given = inputs.map(lambda tensor: tensor.detach().clone())
        leaves, structure = pytree.tree_flatten(module(*given.args, **given.kwargs))
    for value in (*inputs.tensors, *leaves):
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided or value.dtype in _NO_NUMPY:
            what = f"{value.dtype} {value.layout}" if isinstance(value, torch.Tensor) else repr(value)
            raise EngineError(f"{takes} {what}")
    return structure


def nested(
    structure: pytree.TreeSpec, call: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]
) -> Callable[..., Any]:
    """A function of nested tensors, whose outputs are nested as `structure` says, around one of flat dense tensors."""
    single = structure.is_leaf()

    def run(*args: Any, **kwargs: Any) -> Any:
        # The common case is one of tensors alone; to look into structures costs as much as a small layer.
        flat: Sequence[Any] = args
        if kwargs or not all(type(value) is torch.Tensor for value in args):
            flat = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        found = call([leaf.detach().contiguous() for leaf in flat])
        return found[0] if single else pytree.tree_unflatten(found, structure)

    return run


def _export(module: GraphModule, inputs: Inputs, shapes: Any) -> torch.onnx.ONNXProgram:
    with quiet():
        program = torch.onnx.export(
            for_onnx(module), inputs.args, kwargs=dict(inputs.kwargs), dynamo=True, dynamic_shapes=shapes, verbose=False
        )
    assert program is not None
    if len(program.model.graph.inputs) != len(inputs.tensors):
        raise EngineError(f"it has {len(program.model.graph.inputs)} inputs in place of {len(inputs.tensors)}")
    _drop_metadata(program.model)
    return program


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
