"""A captured module as an ONNX model with free sizes, where it has some."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from fxopt.capture.leaves import is_leaf
from fxopt.capture.shell import run_shell
from fxopt.capture.structure import Apply
from fxopt.contract import Skip
from fxopt.engines.onnx.decided import without_decided_guards
from fxopt.engines.onnx.outputs import Outputs
from fxopt.engines.onnx.program import program_of
from fxopt.engines.onnx.static import with_static_values
from fxopt.engines.onnx.unchecked import without_checks
from fxopt.errors import EngineError
from fxopt.graph import GraphModule, Program
from fxopt.inputs import Inputs

_BATCH = "batch"
_KNOWN = ("torch", "_operator", "operator", "math", "builtins", "fxopt")
Free = Literal["batch", "all"]
"""Which sizes of the inputs a model leaves free, as far as the module does."""
FREE_OPTION = {"help": "which sizes are free from the start, and in a saved file: batch, or all"}
"""What engines that export say of their option `free`."""


@dataclass(frozen=True)
class Export:
    """A module as ONNX.

    Attributes:
        program: the model.
        reasons: what it lacks: sizes that are fixed and were to be free, and why, and checks of the module.
        fixed: whether there are such sizes.
        asks: whether it may hold for some sizes only: guards of the module decide by them, which it has not, or code
            may that no graph holds, or the exporter did.
    """

    program: torch.onnx.ONNXProgram
    reasons: tuple[Skip, ...] = ()
    fixed: bool = False
    asks: bool = False


def export(module: GraphModule, inputs: Inputs, outputs: Outputs, free: Free = "batch") -> Export:
    """The module as ONNX, with a free batch size where it has one, or all sizes free that can be.

    Raises:
        EngineError: where torch cannot export it, with its reason; where all sizes are to be free, also where numbers
            among the outputs follow them.
    """
    module, unchecked = without_checks(module)
    module, told = with_static_values(module, inputs)
    found = (_with_free_sizes if free == "all" else _with_free_batch)(module, inputs, outputs)
    return replace(found, reasons=(*found.reasons, *unchecked, *told))


def _with_free_sizes(module: GraphModule, inputs: Inputs, outputs: Outputs) -> Export:
    if outputs.counts:
        raise EngineError("a number among the outputs follows the sizes")
    several = inputs.with_batch(2) if inputs.batch_size == 1 else inputs
    assert several is not None
    shapes = _shapes(several, lambda tensor: dict.fromkeys(range(tensor.dim()), torch.export.Dim.AUTO))
    try:
        program = program_of(without_decided_guards(module, [several])[0], several, outputs, shapes)
    except Exception as error:  # the exporter raises anything
        raise EngineError(f"torch cannot export one with free sizes: {_first_line(error)}{_opaque(module)}") from error
    fixed = ", ".join(_fixed(program))
    told = (Skip("", f"in the model with free sizes {fixed}"),) if fixed else ()
    # The exporter drops what it assumes of sizes, as that all windows of a pool are of one size.
    return Export(program, told, fixed=bool(fixed), asks=True)


def _fixed(program: torch.onnx.ONNXProgram) -> Iterator[str]:
    """The sizes of inputs that the exporter takes for one number."""
    assert program.exported_program is not None
    ranges = {str(symbol): values for symbol, values in program.exported_program.range_constraints.items()}
    for index, value in enumerate(program.model.graph.inputs):
        for dim, size in enumerate(value.shape or ()):
            values = None if isinstance(size, int) else ranges.get(str(size.value))
            if isinstance(size, int) or (values is not None and values.is_singleton()):
                yield f"dimension {dim} of input {index} stays {size if values is None else values.lower}"


def _shapes(inputs: Inputs, free: Callable[[torch.Tensor], object]) -> Any:
    """What is free of each tensor, nested as `inputs` are."""
    fixed = {id(tensor) for tensor in inputs.static_tensors}

    def shape(leaf: object) -> object:
        return free(leaf) if isinstance(leaf, torch.Tensor) and id(leaf) not in fixed else None

    return pytree.tree_map(shape, (inputs.args, dict(inputs.kwargs)))


def _with_free_batch(module: GraphModule, inputs: Inputs, outputs: Outputs) -> Export:
    batch = None if outputs.counts else inputs.batch_size
    reason = "a number that it gives follows it" if outputs.counts else "the inputs have no common batch size"
    if batch:
        # An example of one row would be taken for a constant.
        several = inputs if batch > 1 else inputs.with_batch(2)
        assert several is not None
        shape = torch.export.Dim(_BATCH, min=1)
        shapes = _shapes(several, lambda tensor: {0: shape} if tensor.dim() > 0 else None)
        try:
            decided, asks = without_decided_guards(module, _of_two_batches(several))
            program = program_of(decided, several, outputs, shapes)
            # The exporter fixes what it can't follow, or what the module holds for only, and says so nowhere.
            if any(isinstance(size, int) for size in _first_sizes(program, several)):
                reason = f"the exporter takes that of the example, {batch}, for the only one that the module holds for"
            else:
                return Export(program, asks=asks or _runs_unseen(module))
        except Exception as error:  # the exporter raises anything
            reason = f"the exporter says: {_first_line(error)}"
    try:
        program = program_of(without_decided_guards(module, [inputs])[0], inputs, outputs, None)
        return Export(program, (Skip("", f"the batch size is fixed: {reason}"),), fixed=True)
    except Exception as error:
        raise EngineError(f"torch cannot export one: {_first_line(error)}{_opaque(module)}") from error


def _of_two_batches(inputs: Inputs) -> list[Inputs]:
    other = inputs.with_batch((inputs.batch_size or 0) + 1)
    assert other is not None
    return [inputs, other]


def _first_sizes(program: torch.onnx.ONNXProgram, inputs: Inputs) -> Iterator[object]:
    fixed = {id(tensor) for tensor in inputs.static_tensors}
    for value, tensor in zip(program.model.graph.inputs, inputs.tensors, strict=True):
        if value.shape and id(tensor) not in fixed:
            yield value.shape[0]


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
                code = node.target.cls if isinstance(node.target, Apply) else node.target
                home = code.__module__ or "torch"
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
