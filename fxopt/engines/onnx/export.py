"""A captured module as an ONNX model with a free batch size, where it has one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from fxopt.capture.leaves import is_leaf
from fxopt.capture.shell import run_shell
from fxopt.capture.structure import Apply
from fxopt.contract import Skip
from fxopt.engines.onnx.decided import without_decided_guards
from fxopt.engines.onnx.outputs import Outputs
from fxopt.engines.onnx.program import program_of
from fxopt.errors import EngineError
from fxopt.graph import GraphModule, Program
from fxopt.inputs import Inputs

_BATCH = "batch"
_KNOWN = ("torch", "_operator", "operator", "math", "builtins", "fxopt")
ASKED = Skip("", "whether it holds for a batch size is asked of the module at each new one; a saved file asks nothing")
"""Told of a model whose export `asks`."""


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
            program = program_of(decided, several, outputs, shapes)
            # The exporter fixes what the module turns out to hold for only, and says so nowhere.
            if any(isinstance(value.shape[0], int) for value in program.model.graph.inputs if value.shape):
                reason = f"the module does not hold for another one than that of the example, {batch}"
            else:
                return Export(program, asks=asks or _runs_unseen(module))
        except Exception as error:  # the exporter raises anything
            reason = f"the exporter says: {_first_line(error)}"
    try:
        program = program_of(without_decided_guards(module, [inputs])[0], inputs, outputs, None)
        return Export(program, (Skip("", f"the batch size is fixed: {reason}"),))
    except Exception as error:
        raise EngineError(f"torch cannot export one: {_first_line(error)}{_opaque(module)}") from error


def _of_two_batches(inputs: Inputs) -> list[Inputs]:
    other = inputs.with_batch((inputs.batch_size or 0) + 1)
    assert other is not None
    return [inputs, other]


def _has_rows(leaf: object) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.dim() > 0


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
