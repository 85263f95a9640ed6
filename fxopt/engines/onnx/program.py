"""One export of a module by torch, and what is done to the model so that runtimes find their fastest kernels."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fxopt.engines.onnx.attention import transpose_keys
from fxopt.engines.onnx.biases import hold_biases
from fxopt.engines.onnx.empty import drop_empty_assignments
from fxopt.engines.onnx.functions import TRANSLATED, ExportedOtherwise, masks_unasked
from fxopt.engines.onnx.moved import pad_integers, split_weights
from fxopt.engines.onnx.outputs import Outputs
from fxopt.engines.onnx.parted import part_zero_points
from fxopt.engines.onnx.products import part_sums, transpose_weights
from fxopt.engines.onnx.quiet import quiet
from fxopt.engines.onnx.simplify import simplify
from fxopt.errors import EngineError
from fxopt.graph import GraphModule
from fxopt.inputs import Inputs
from fxopt.modules import for_onnx
from fxopt.nested import tensors_in


def program_of(module: GraphModule, inputs: Inputs, outputs: Outputs, shapes: Any) -> torch.onnx.ONNXProgram:
    """Export a module.

    Args:
        module: what to export.
        inputs: an example.
        outputs: what it gives for that.
        shapes: the free sizes of each tensor among the inputs, nested as these are; None where all are fixed.
    """
    prepared = for_onnx(_without_training(module))
    # Of what a parameter with stars takes, torch's exporter knows neither the names nor the free sizes.
    if outputs.with_others is not None or any(str(node.target).startswith("*") for node in module.graph.nodes):
        prepared = _Plain(prepared, inputs)
    dynamic = None if shapes is None else (*shapes[0], *shapes[1].values())
    # The exporter makes one input of a tensor that is given twice, whatever later calls give there.
    given = inputs.map(lambda tensor: tensor.detach().clone())
    # Where nothing is named, it would read a dict that comes last as the named arguments.
    args = given.args if given.kwargs else (*given.args, {})
    with quiet(), _transforms_ended(), ExportedOtherwise(), masks_unasked():
        program = torch.onnx.export(
            prepared,
            args,
            kwargs=dict(given.kwargs),
            dynamo=True,
            dynamic_shapes=dynamic,
            custom_translation_table=TRANSLATED,
            optimize=False,
            verbose=False,
        )
        assert program is not None
        simplify(program.model)
    if len(program.model.graph.inputs) != len(inputs.tensors):
        raise EngineError(f"it has {len(program.model.graph.inputs)} inputs in place of {len(inputs.tensors)}")
    for rewrite in _REWRITES:
        rewrite(program.model)
    return program


@contextmanager
def _transforms_ended() -> Iterator[None]:
    """End the transforms of torch.func that an export which fails leaves open: all that follows would run in them."""
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    try:
        yield
    finally:
        torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)


def _without_training(module: GraphModule) -> GraphModule:
    """Without what training alone calls, as an auxiliary head: in evaluation nothing shows its quantisers a range."""
    if None in module.graphs:
        return module
    duplicate = copy.deepcopy(module).eval()
    duplicate.keep_only(duplicate.graph)
    duplicate.delete_all_unused_submodules()
    return duplicate


class _Plain(nn.Module):
    """Takes each argument of `inputs` by a parameter of its own, and gives the tensors that outputs are made of."""

    def __init__(self, module: nn.Module, inputs: Inputs):
        super().__init__()
        self.module = module

        def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
            return tuple(tensors_in(module(*args, **kwargs)))

        known = inspect.signature(module.forward).parameters.values()
        names = [each.name for each in known if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
        names += [f"argument_{number}" for number in range(len(names), len(inputs.args))]
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in inputs.kwargs]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        self.forward = forward


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


_REWRITES = (
    drop_empty_assignments,
    transpose_keys,
    pad_integers,
    split_weights,
    hold_biases,
    transpose_weights,
    part_sums,
    part_zero_points,
    _drop_unread,
    _drop_metadata,
)
